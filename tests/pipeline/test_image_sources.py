"""Images from every kind of source: which ones, what is said of them, and that no others are read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import jpeg_bytes, write_shards, write_tar
from PIL import Image

from formats.errors import UserError
from pipeline.image_sources import load_image, read_images


def write_folder(directory: Path, count: int) -> Path:
    """Pictures of one colour, its red the number, in two folders; every other one has a caption."""
    for number in range(count):
        path = directory / f"{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (number, 0, 0)).save(path)
        if number % 2:
            path.with_suffix(".txt").write_text(f"number {number}\n")
    (directory / "notes.md").write_text("no image")
    return directory


def write_retrieval_set(directory: Path) -> Path:
    (directory / "test").mkdir(parents=True)
    (directory / "test" / "nshards.txt").write_text("1")
    write_tar(directory / "test" / "0.tar", [("a.jpg", jpeg_bytes(0)), ("a.txt", b"one\ntwo\n")])
    return directory


def write_composition_set(directory: Path) -> Path:
    (directory / "images").mkdir(parents=True)
    (directory / "images" / "a.jpg").write_bytes(jpeg_bytes(0))
    entry = {"filename": "a.jpg", "caption": "a cat", "negative_caption": "a dog"}
    (directory / "swap_att.json").write_text(json.dumps({"0": entry, "1": entry}))
    return directory


def write_classification_set(directory: Path) -> Path:
    write_retrieval_set(directory)
    (directory / "classnames.txt").write_text("dog\n")
    (directory / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    write_tar(directory / "test" / "0.tar", [("a.jpg", jpeg_bytes(0)), ("a.cls", b"0")])
    return directory


def test_folder_at_any_depth_with_captions_beside_images(tmp_path: Path) -> None:
    found = read_images(write_folder(tmp_path, 4), 10)
    assert [image.caption for image in found] == ["0/000.png", "0/002.png", "number 1", "number 3"]
    assert [int(load_image(image.image, 8)[0, 0, 0]) for image in found] == [0, 2, 1, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_a_part_is_spread_evenly(count: int, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{number:02d}.jpg", jpeg_bytes(0)) for number in range(10)])
    chosen = [int(image.caption) for image in read_images(tmp_path / "a.tar", count)]
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    edges = [-1 - chosen[0], *chosen, 20 - chosen[-1]]  # mirrored at both ends
    gaps = [after - before for before, after in itertools.pairwise(edges)]
    assert max(gaps) - min(gaps) <= 2


def test_tar_with_and_without_captions(tmp_path: Path) -> None:
    members = [("x/a.JPG", jpeg_bytes(1)), ("x/a.txt", b" a cat \n"), ("b.png", jpeg_bytes(2)), ("c.json", b"{}")]
    write_tar(tmp_path / "some.tar", members)
    for source in (tmp_path / "some.tar", tmp_path):
        assert [(image.image.read(), image.caption) for image in read_images(source)] == [
            (jpeg_bytes(1), "a cat"),
            (jpeg_bytes(2), "b"),
        ]


def test_shard_directory_leaves_out_what_verify_did(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2])
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    lines[0] |= {"samples": 2, "skip": ["00000001"]}
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [image.caption for image in read_images(tmp_path)] == [
        "picture number 0 of a cat",
        "picture number 2 of a bird",
    ]


@pytest.mark.parametrize(
    ("write", "caption"),
    [(write_retrieval_set, "one"), (write_composition_set, "a cat"), (write_classification_set, "dog")],
)
def test_evaluation_sets(write: object, caption: str, tmp_path: Path) -> None:
    assert callable(write)
    (image,) = read_images(write(tmp_path))
    assert (image.image.read(), image.caption) == (jpeg_bytes(0), caption)


@pytest.mark.parametrize("source", ["absent", "empty", "no_images.tar", "damaged.tar", "compressed.tar", "no_shards"])
def test_sources_without_images(source: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("words")
    (tmp_path / "no_shards").mkdir()
    (tmp_path / "no_shards" / "manifest.jsonl").write_text("")
    write_tar(tmp_path / "no_images.tar", [("a.txt", b"words")])
    (tmp_path / "damaged.tar").write_bytes(b"\x01" * 3000)
    (tmp_path / "compressed.tar").write_bytes(b"\x1f\x8b" + bytes(3000))
    with pytest.raises(UserError, match=source) as error:
        read_images(tmp_path / source)
    assert "\n" not in str(error.value)
    assert ("gzip" in str(error.value)) == (source == "compressed.tar")


def test_a_tar_that_was_cut_off_shows_what_precedes_the_cut(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg_bytes(0)), ("b.jpg", jpeg_bytes(1))])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"b.jpg") + 600])
    assert [image.caption for image in read_images(tmp_path / "a.tar")] == ["a"]


@pytest.mark.parametrize(
    ("content", "reason"), [(jpeg_bytes(0)[:100], "."), (b"<html>", "not a JPEG, PNG or WebP: '<html>'$")]
)
def test_what_does_not_decode_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    (image,) = read_images(tmp_path)
    with pytest.raises(UserError, match=rf"a\.jpg does not decode: {reason}"):
        load_image(image.image, 8)
