"""The corpus on disk: layout, determinism, held-out combinations, and what happens when it cannot be written."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from caption_parser import parse
from PIL import Image

from data_prep.synthetic import corpus as synthetic
from data_prep.synthetic.hard_negatives import KINDS
from data_prep.synthetic.scenes import COLOURS, SHAPES
from formats.errors import UserError

pytestmark = pytest.mark.slow

TRAIN, VALIDATION, SIZE = 620, 60, 32
BASE_URL = "http://127.0.0.1:8000/corpus/"


def _generate(output: Path, *, seed: int = 7, processes: int = 1, base_url: str | None = None) -> Path:
    synthetic.generate(
        output,
        train=TRAIN,
        validation=VALIDATION,
        size=SIZE,
        seed=seed,
        processes=processes,
        base_url=base_url,
    )
    return output


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _rows(corpus: Path, split: str) -> list[dict[str, str]]:
    with (corpus / f"{split}.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _members(directory: Path) -> dict[str, dict[str, bytes]]:
    """All samples of an evaluation set: key -> extension -> content."""
    samples: dict[str, dict[str, bytes]] = {}
    for number in range(int((directory / "test" / "nshards.txt").read_text())):
        with tarfile.open(directory / "test" / f"{number}.tar") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = stream.read()
    return samples


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _generate(tmp_path_factory.mktemp("synthetic") / "corpus", base_url=BASE_URL)


@pytest.fixture(scope="module")
def held_out(corpus: Path) -> set[str]:
    return set(json.loads((corpus / "synthetic.json").read_text())["held_out_combinations"])


def test_bytes_do_not_depend_on_the_number_of_processes(corpus: Path, tmp_path: Path) -> None:
    again = _generate(tmp_path / "again", processes=2, base_url=BASE_URL)
    assert _digests(again) == _digests(corpus)


def test_another_seed_gives_another_corpus(corpus: Path, tmp_path: Path) -> None:
    other = _digests(_generate(tmp_path / "other", seed=8, base_url=BASE_URL))
    images = [name for name in other if name.endswith(".jpg")]
    assert set(other) == set(_digests(corpus))
    assert not any(other[name] == digest for name, digest in _digests(corpus).items() if name in images)


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("validation", VALIDATION)])
def test_table_lists_every_image_with_its_caption(corpus: Path, split: str, count: int) -> None:
    rows = _rows(corpus, split)
    assert len(rows) == count
    assert {row["image"] for row in rows} == {
        str(path.relative_to(corpus)) for path in (corpus / split / "images").rglob("*.jpg")
    }
    for row in rows:
        parse(row["caption"])
        with Image.open(corpus / row["image"]) as image:
            image.load()
            assert (image.size, image.format) == ((SIZE, SIZE), "JPEG")


def test_images_are_all_different(corpus: Path) -> None:
    digests = Counter(digest for name, digest in _digests(corpus).items() if name.endswith(".jpg"))
    assert max(digests.values()) == 1


def test_url_list_is_cc3m_form(corpus: Path) -> None:
    lines = (corpus / "train.tsv").read_text(encoding="utf-8").splitlines()
    expected = [f"{row['caption']}\t{BASE_URL}{row['image']}" for row in _rows(corpus, "train")]
    assert lines == expected


def test_no_url_list_without_a_base_url(tmp_path: Path) -> None:
    assert not (_generate(tmp_path / "corpus") / "train.tsv").exists()


def test_validation_captions_are_distinct(corpus: Path) -> None:
    captions = [row["caption"].rstrip(".") for row in _rows(corpus, "validation")]
    assert len(set(captions)) == VALIDATION


def test_retrieval_set_holds_the_validation_pairs(corpus: Path) -> None:
    samples = _members(corpus / "eval" / "retrieval")
    found = {sample["txt"].decode(): sample["jpg"] for sample in samples.values()}
    assert found == {row["caption"]: (corpus / row["image"]).read_bytes() for row in _rows(corpus, "validation")}


def test_held_out_combinations_appear_only_in_the_zero_shot_sets(corpus: Path, held_out: set[str]) -> None:
    captions = [row["caption"] for split in ("train", "validation") for row in _rows(corpus, split)]
    for kind in KINDS:
        entries = json.loads((corpus / "eval" / "composition" / f"{kind}.json").read_text()).values()
        captions += [entry[name] for entry in entries for name in ("caption", "negative_caption")]
    shown = {" ".join(item.combination) for text in captions for item in parse(text).named}
    assert shown == {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES} - held_out


@pytest.mark.parametrize("name", ["zeroshot", "zeroshot_heldout"])
def test_zero_shot_sets_are_balanced_over_their_classes(corpus: Path, held_out: set[str], name: str) -> None:
    directory = corpus / "eval" / name
    classnames = (directory / "classnames.txt").read_text().splitlines()
    templates = (directory / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert classnames == [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    assert len(templates) > 3
    assert all("{c}" in template for template in templates)
    samples = _members(directory)
    labels = Counter(classnames[int(sample["cls"])] for sample in samples.values())
    shown = held_out if name == "zeroshot_heldout" else set(classnames)
    assert labels == dict.fromkeys(shown, synthetic.IMAGES_PER_CLASS)
    stated = json.loads((directory / "dataset.json").read_text())
    assert stated.get("allow_empty_classes", False) == (shown != set(classnames))
    for sample in samples.values():
        assert Image.open(io.BytesIO(sample["jpg"])).size == (SIZE, SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_composition_sets_are_in_sugarcrepe_form(corpus: Path, kind: str) -> None:
    directory = corpus / "eval" / "composition"
    entries = json.loads((directory / f"{kind}.json").read_text())
    assert list(entries) == [str(index) for index in range(VALIDATION // 4)]
    for entry in entries.values():
        assert set(entry) == {"filename", "caption", "negative_caption"}
        assert entry["caption"] != entry["negative_caption"]
        assert Image.open(directory / "images" / entry["filename"]).size == (SIZE, SIZE)


def test_description_counts_what_is_there(corpus: Path) -> None:
    description = json.loads((corpus / "synthetic.json").read_text())
    assert description["samples"] == {
        "train": len(list((corpus / "train").rglob("*.jpg"))),
        "validation": len(list((corpus / "validation").rglob("*.jpg"))),
        "zeroshot": len(_members(corpus / "eval" / "zeroshot")),
        "zeroshot_heldout": len(_members(corpus / "eval" / "zeroshot_heldout")),
        "composition": len(list((corpus / "eval" / "composition" / "images").iterdir())),
    }


def test_a_folder_with_content_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty: choose another folder, or remove it"):
        _generate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_too_small_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use 32 or more"):
        synthetic.generate(tmp_path / "corpus", 1, 1, size=16, seed=0, processes=1, base_url=None)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, jpeg: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(synthetic, "_write_image", full)
    with pytest.raises(UserError, match=r"cannot write .*000000\.jpg: No space left on device"):
        _generate(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
