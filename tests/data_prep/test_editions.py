"""Smaller editions: every sample in its place, pictures as a slow obvious way makes them, and only true claims."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from make_images import write_tar
from make_shards import assert_consistent, make_shards, manifest, picture, sample, snapshot
from PIL import Image, ImageOps

from data_prep.__main__ import main
from data_prep.editions import write_edition
from data_prep.forget import forget
from data_prep.shards.merge import merge
from data_prep.shards.verify import verify
from formats.manifest import read_manifest
from formats.tar import TarSamples

ROOT = Path(__file__).resolve().parents[2]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def wide(number: int, kind: str = "JPEG", size: tuple[int, int] = (90, 60), **options: object) -> bytes:
    return encoded(Image.open(io.BytesIO(picture(number, 90))).resize(size), kind, **options)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return wide(1, exif=exif, quality=95)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Pictures of all kinds, small ones, one that is left out, and one that only the manifest takes for usable."""
    clear = Image.new("RGBA", (80, 70), (200, 0, 0, 0))
    members = [
        *sample(0, wide(0, quality=95)),
        *sample(1, turned()),
        ("2.png", encoded(clear, "PNG")), ("2.txt", b"clear"),
        *sample(3, wide(3, size=(40, 32))),
        ("4.jpg", b"none"), ("4.txt", b"left out"),
        ("5.webp", wide(5, "WEBP")), ("5.txt", b"another format"),
        ("6.png", encoded(clear.resize((20, 20)), "PNG")), ("6.txt", b"small and clear"),
        ("7.jpg", wide(7)), ("7.txt", b"damaged later on"),
    ]  # fmt: skip
    directory = tmp_path / "source"
    write_tar(directory / "00000.tar", members)
    write_tar(directory / "00001.tar", [("b.jpg", b""), ("b.txt", b"nothing usable in this shard")])
    write_tar(directory / "00003.tar", sample(9, wide(9, size=(600, 33))))
    verify(directory, 1, max_bad_ratio=1.0)
    content = (directory / "00000.tar").read_bytes()  # of the same size, as somebody else's manifest may describe it
    at = content.index(wide(7))
    (directory / "00000.tar").write_bytes(content[:at] + bytes(300) + content[at + 300 :])
    return directory


def test_every_sample_keeps_its_place_and_has_a_smaller_picture(source: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    arguments = ["reshard", str(source), "--image-size", "32", "--quality", "95", "--output", str(small)]
    assert main([*arguments, "--processes", "2"]) == 0
    assert_consistent(small)
    assert [line["shard"] for line in manifest(small)] == ["00000.tar", "00003.tar"]
    found = {s.key: s.members for path in sorted(small.glob("*.tar")) for s in TarSamples(path)}
    before = {s.key: s.members for path in sorted(source.glob("*.tar")) for s in TarSamples(path)}
    assert [*found] == [key for key in before if key not in ("4", "b")]
    for key in ("000000000", "000000001", "2", "5", "000000009"):
        (data,) = (before[key][kind] for kind in ("jpg", "png", "webp") if kind in before[key])
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        scale = 32 / min(image.size)
        expected = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        shown = Image.open(io.BytesIO(found[key]["jpg"]))
        assert shown.size == expected.size
        assert min(shown.size) == 32
        assert np.abs(np.asarray(shown, float) - np.asarray(expected, float)).mean() < 4, key
        assert [*found[key]][1:] == [*before[key]][1:]
        assert all(found[key][kind] == before[key][kind] for kind in ("txt", "json") if kind in before[key])
    assert found["000000003"] == before["000000003"], "no picture is enlarged, or encoded again for nothing"
    assert found["7"] == before["7"], "what does not decode keeps its place"
    assert Image.open(io.BytesIO(found["6"]["png"])).getcolors() == [(400, (255, 255, 255))]


def test_the_manifest_names_the_source(source: Path, tmp_path: Path) -> None:
    write_edition(source, tmp_path / "small", 32, 90, 1)
    write_edition(tmp_path / "small", tmp_path / "smaller", 16, 90, 1)
    for name, size in (("small", 32), ("smaller", 16)):
        assert read_manifest(tmp_path / name).sha256 == read_manifest(source).sha256
        step = json.loads((tmp_path / name / "dataset.json").read_text())["source"][-1]
        assert (step["step"], step["image_size"], step["quality"]) == ("reshard", size, 90)
        assert step["sources"][0].keys() == {"directory", "manifest_sha256"}
    lines = manifest(tmp_path / "small")
    assert {(e["manifest_sha256"], e["shards"]) for e in (line["edition_of"] for line in lines)} == {
        (read_manifest(source).sha256, 2)
    }


def test_only_a_whole_and_unchanged_edition_counts_as_its_source(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "source", [3, 2, 2])
    sha256 = read_manifest(source).sha256
    small = tmp_path / "small"
    write_edition(source, small, 32, 90, 1)
    assert verify(small, 1, max_bad_ratio=0, again=True)
    assert read_manifest(small).sha256 == sha256

    def changed(name: str) -> Path:
        shutil.copytree(small, tmp_path / name)
        return tmp_path / name

    lost = changed("lost")
    (lost / "00001.tar").unlink()
    verify(lost, 1, max_bad_ratio=0)
    swapped = changed("swapped")
    write_tar(swapped / "00002.tar", [*sample(20), *sample(21)])
    verify(swapped, 1, max_bad_ratio=0)
    forgotten = changed("forgotten")
    (tmp_path / "hosts").write_text("host1.example.org\n")
    forget(forgotten, tmp_path / "hosts", "host", 1)
    merge([small, small], tmp_path / "twice", 1, keep_keys=True)
    for directory in (lost, swapped, forgotten, tmp_path / "twice"):
        found = read_manifest(directory).sha256
        assert found != sha256, directory
        assert any("edition_of" in line for line in manifest(directory)), "or there was nothing to tell apart"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-shard", "3"], "leave out --samples-per-shard"),
        (["--shuffle", "--normalise"], "leave out --shuffle, --normalise"),
        (["{other}"], "an edition is of one directory"),
        (["--quality", "0"], "must be from 1 to 100"),
        (["--image-size", "0"], "must be at least 1"),
    ],
)
def test_what_is_no_edition(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = make_shards(tmp_path / "source", [1]), make_shards(tmp_path / "other", [1])
    options = [option.format(other=other) for option in options]
    try:
        code = main(["reshard", str(source), *options, "--image-size", "9", "--output", str(tmp_path / "out")])
    except SystemExit as error:  # argparse's
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_random_times_it_goes_on(tmp_path: Path) -> None:
    """SIGKILL of the command alone: its workers end with it, and the next start takes over."""
    source = make_shards(tmp_path / "source", [6] * 8)
    output = tmp_path / "output"
    write_edition(source, tmp_path / "undisturbed", 32, 90, 1)
    command = [sys.executable, "-m", "data_prep", "reshard", str(source), "--image-size", "32", "--output", str(output)]
    rng, kills = random.Random(0), 0
    while not output.exists() and kills < 5:
        process = subprocess.Popen([*command, "--processes", "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
        begin_s = time.monotonic()
        notes = tmp_path / "output.partial" / "work" / "done.jsonl"
        while process.poll() is None and not notes.exists() and time.monotonic() < begin_s + 60:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.2))
        process.kill()
        process.wait()
        kills += 1
    if not output.exists():
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert snapshot(output) == snapshot(tmp_path / "undisturbed")
