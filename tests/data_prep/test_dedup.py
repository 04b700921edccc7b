from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_images import write_tar
from make_shards import assert_consistent, captions, make_shards, manifest, picture, sample
from PIL import Image, ImageEnhance

from data_prep.__main__ import main
from data_prep.near.near_duplicates import nearest_kept
from data_prep.near.perceptual_hash import BITS, SIDE, distances, hash_pictures, shrink
from data_prep.shards.verify import verify
from data_prep.synthetic.evaluation_sets import write_classification_set, write_retrieval_set

MEMORY_BYTES = 1_000_000


def again(data: bytes, size: int = 48, kind: str = "JPEG", quality: int = 70, brightness: float = 1.0) -> bytes:
    """The picture, scaled and encoded another way."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    ImageEnhance.Brightness(image).enhance(brightness).save(stream, kind, quality=quality)
    return stream.getvalue()


def hashes_of(*pictures: bytes) -> np.ndarray:
    return hash_pictures([shrink(data) for data in pictures])


def test_the_hash_is_the_sign_of_the_lowest_frequencies() -> None:
    """Against the transform written out as its definition says, frequency by frequency."""
    grey_SS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE)).astype(np.uint8)
    frequencies = [(row, total - row) for total in range(1, 2 * SIDE) for row in range(total + 1)][:BITS]
    expected = 0
    positions = np.arange(SIDE) + 0.5
    for bit, (row, column) in enumerate(frequencies):
        wave_SS = np.outer(np.cos(np.pi * row * positions / SIDE), np.cos(np.pi * column * positions / SIDE))
        scale = (1 if row else 0.5**0.5) * (1 if column else 0.5**0.5) * 2 / SIDE
        if scale * (wave_SS * grey_SS).sum() > 4:
            expected |= 1 << bit
    assert int(hash_pictures([grey_SS])[0]) == expected


@pytest.mark.parametrize(
    "change",
    [{"size": 40}, {"size": 100}, {"quality": 40}, {"kind": "WEBP"}, {"kind": "PNG"}, {"brightness": 0.9}],
    ids=str,
)
def test_the_same_picture_encoded_anew_is_near(change: dict[str, object]) -> None:
    originals = [picture(seed) for seed in range(40)]
    changed = [again(data, **change) for data in originals]  # type: ignore[arg-type]
    near = distances(hashes_of(*originals), hashes_of(*changed))
    assert np.mean(near <= 4) >= 0.9


def test_other_pictures_are_far() -> None:
    hashes_N = hashes_of(*(picture(seed) for seed in range(60)))
    apart = [int(distances(hashes_N[i : i + 1], hashes_N[j : j + 1])[0]) for i in range(60) for j in range(i)]
    assert min(apart) > 10
    assert 28 < np.mean(apart) < 36


def test_pictures_without_content_are_alike() -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(stream, "PNG")
    plain = [again(stream.getvalue(), kind=kind) for kind in ("JPEG", "PNG")]
    assert hashes_of(stream.getvalue(), *plain).tolist() == [0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=20))
def test_distances_are_numbers_of_bits(pairs: list[tuple[int, int]]) -> None:
    first_N, second_N = np.array(pairs, np.uint64).T
    assert distances(first_N, second_N).tolist() == [(a ^ b).bit_count() for a, b in pairs]


def slow_nearest_kept(hashes: list[int], fixed: int, max_distance: int) -> list[int]:
    """All with all, in order."""
    partners: list[int] = []
    for later, value in enumerate(hashes):
        near = [
            earlier
            for earlier in range(later)
            if partners[earlier] == -1 and (hashes[earlier] ^ value).bit_count() <= max_distance
        ]
        near.sort(key=lambda earlier: hashes[earlier] != value)
        partners.append(near[0] if near and later >= fixed else -1)
    return partners


@st.composite
def clouds(draw: st.DrawFn) -> list[int]:
    """Hashes around a few centres, so that many are near each other."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=7)
    members = st.tuples(st.sampled_from(centres), flips)
    return [
        centre ^ sum({bit: 1 << bit for bit in flipped}.values())
        for centre, flipped in draw(st.lists(members, min_size=1, max_size=30))
    ]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hashes=clouds(), fixed=st.integers(0, 5), max_distance=st.integers(0, 8), memory_bytes=st.integers(100, 5000))
def test_near_ones_are_those_that_comparing_all_with_all_finds(
    tmp_path: Path, hashes: list[int], fixed: int, max_distance: int, memory_bytes: int
) -> None:
    fixed = min(fixed, len(hashes))
    hashes_N = np.array(hashes, np.uint64)
    partner_N, distance_N = nearest_kept(hashes_N, fixed, max_distance, tmp_path, memory_bytes)
    assert partner_N.tolist() == slow_nearest_kept(hashes, fixed, max_distance)
    for place, partner in enumerate(partner_N.tolist()):
        if partner >= 0:
            assert distance_N[place] == (hashes[place] ^ hashes[partner]).bit_count()


def test_many_equal_hashes_take_no_quadratic_time(tmp_path: Path) -> None:
    hashes_N = np.zeros(300_000, np.uint64)
    hashes_N[::2] = np.random.default_rng(0).integers(0, 2**64, 150_000, np.uint64)
    partner_N, _ = nearest_kept(hashes_N, 0, 4, tmp_path, 1 << 28)
    assert int((partner_N >= 0).sum()) == 149_999


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """0-3 and 4-7 of which 5 is 1 in another size, 6 equals 2, 7 is in an evaluation set."""
    directory = tmp_path / "shards"
    make_shards(directory, [4], check=False)
    second = [*sample(4), *sample(5, again(picture(1))), *sample(6, picture(2)), *sample(7)]
    write_tar(directory / "00001.tar", second)
    assert verify(directory, 1, max_bad_ratio=0.0)
    return directory


def numbers(directory: Path) -> list[int]:
    return [int(caption.split()[2].rstrip(",")) for caption in captions(directory)]


@pytest.mark.parametrize("layout", ["retrieval", "classification", "composition", "shards"])
def test_near_duplicates_and_evaluation_pictures_are_found_and_removed(
    tmp_path: Path, corpus: Path, layout: str
) -> None:
    seen = again(picture(7), size=52)
    evaluation = tmp_path / "evaluation"
    if layout == "retrieval":
        write_retrieval_set(evaluation, [(picture(50), ["x"]), (seen, ["y"])])
    elif layout == "classification":
        write_classification_set(evaluation, [(picture(50), 0), (seen, 0)], ["a"], ["{c}"])
    elif layout == "composition":
        (evaluation / "images").mkdir(parents=True)
        (evaluation / "images" / "a.jpg").write_bytes(seen)
        (evaluation / "images" / "b.jpg").write_bytes(b"damaged")
    else:
        write_tar(evaluation / "00000.tar", [*sample(50), ("seen.jpg", seen)])
    report = tmp_path / "report"
    arguments = ["dedup", str(corpus), "--output", str(report), "--against", str(evaluation), "--processes", "2"]
    assert main(arguments) == 0
    assert numbers(corpus) == list(range(8))
    lines = [json.loads(line) for line in (report / "duplicates.jsonl").read_text().splitlines()]
    assert [(line["shard"], int(line["key"])) for line in lines] == [("00001.tar", n) for n in (5, 6, 7)]
    assert [line["near_key"] for line in lines[:2]] == ["000000001", "000000002"]
    assert lines[1]["distance"] == 0
    assert lines[2]["near"].startswith(str(evaluation))
    summary = json.loads((report / "summary.json").read_text())
    assert (summary["near_training"], summary["near_evaluation"], summary["pictures"]) == (2, 1, 8)
    page = (report / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)

    assert main([*arguments, "--remove"]) == 0
    assert numbers(corpus) == [0, 1, 2, 3, 4]
    assert_consistent(corpus)
    assert json.loads((corpus / "provenance.jsonl").read_text())["samples_removed"] == 3
    after = manifest(corpus)
    assert main([*arguments, "--remove"]) == 0
    assert manifest(corpus) == after


def test_hashes_are_computed_once(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["dedup", str(corpus), "--output", str(tmp_path / "report"), "--processes", "1"]
    assert main(arguments) == 0
    monkeypatch.setattr("data_prep.near.picture_hashes.shrink", lambda data: pytest.fail("hashed again"))
    assert main([*arguments, "--max-distance", "0"]) == 0
    lines = (tmp_path / "report" / "duplicates.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000000006"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{shards}", "--output", "{out}", "--against", "{empty}"], "no pictures in"),
        (["{shards}", "--output", "{out}", "--max-distance", "30"], "more than 16"),
        (["{shards}", "--output", "{shards}/report"], "lies in the shard directory"),
        (["{empty}", "--output", "{out}"], "holds no *.tar"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, corpus: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    paths = {"shards": corpus, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    assert main(["dedup", *(argument.format(**paths) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_set_is_never_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_shards(tmp_path / "shards", [3, 2])
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (tmp_path / "link").symlink_to(directory)
    before = captions(directory)
    for other in (directory, copy, tmp_path / "link"):
        command = ["dedup", str(directory), "--against", str(other), "--output", str(tmp_path / "report"), "--remove"]
        assert main(command) == 2
        assert "every picture would be a duplicate" in capsys.readouterr().err
    assert captions(directory) == before


def test_more_than_a_share_is_not_removed_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures that are all alike: a set of blank pages, say."""
    same = picture(1)
    members = [member for n in range(5) for member in ((f"{n}.jpg", same), (f"{n}.txt", f"page {n}".encode()))]
    write_tar(tmp_path / "shards" / "00000.tar", members)
    verify(tmp_path / "shards", 1, max_bad_ratio=0)
    command = ["dedup", str(tmp_path / "shards"), "--output", str(tmp_path / "report"), "--remove"]
    assert main(command) == 2
    assert "4 of 5 samples would be removed" in capsys.readouterr().err
    assert len(captions(tmp_path / "shards")) == 5
    assert main([*command, "--max-removed", "0.8"]) == 0
    assert captions(tmp_path / "shards") == ["page 0"]
