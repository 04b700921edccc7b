"""What `data-prep verify` counts is what the training loader finds, shard by shard and key by key."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_reading import loader_index

from data_prep.shards.verify import verify
from data_prep.shards.words import count_words
from data_prep.shards.writer import ShardWriter
from formats.manifest import read_manifest
from formats.word_counts import read_word_frequencies


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(stream, kind)
    return stream.getvalue()


CONTENTS = {
    "jpg": [encoded("JPEG"), encoded("JPEG")[:-9], b""],
    "png": [encoded("PNG")],
    "txt": [b"a caption", b"", b"\xff"],
    "json": [b"{}"],
    "cls": [b"3"],
    "JPG": [encoded("JPEG")],
    "tar.gz": [b"x"],
}
MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "../a", "./b", "/etc/c", "folder/a", "", "f/"]),
        st.sampled_from(sorted(CONTENTS)),
        st.integers(0, 2),
        st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.DIRTYPE]),
    ),
    max_size=14,
)


def write_tar(path: Path, members: list[tuple[str, str, int, bytes]], tar_format: int) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key, extension, choice, kind in members:
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.type = kind
            content = CONTENTS[extension][choice % len(CONTENTS[extension])] if kind == tarfile.REGTYPE else b""
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=MEMBERS, tar_format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_the_loader_finds_the_samples_that_verify_counted(
    tmp_path: Path, members: list[tuple[str, str, int, bytes]], tar_format: int
) -> None:
    good = [("good", "jpg", 0, tarfile.REGTYPE), ("good", "txt", 0, tarfile.REGTYPE)]
    write_tar(tmp_path / "00000.tar", [*members, *good], tar_format)
    verify(tmp_path, processes=1, max_bad_ratio=1.0)
    (shard,) = read_manifest(str(tmp_path)).shards
    index = loader_index(shard)  # raises if the counts differ
    assert "good" in index.keys
    assert len(index.keys) == shard.samples


@pytest.mark.parametrize("cut", ["header", "content", "checksum", "endless header"])
def test_the_loader_uses_what_precedes_a_truncation(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "00000.tar"
    write_tar(path, [(key, kind, 0, tarfile.REGTYPE) for key in "abc" for kind in ("jpg", "txt")], tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        third = tar.getmember("c.jpg")
    content = path.read_bytes()
    header = bytearray(content[third.offset : third.offset + 512])
    if cut == "endless header":
        header[124:136], header[156:157] = b"\x80" + b"\xff" * 11, b"x"
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(
        {
            "header": content[: third.offset + 9],
            "content": content[: third.offset_data + 9],
            "checksum": content[: third.offset + 148] + b"0000000" + content[third.offset + 155 :],
            "endless header": content[: third.offset] + header + content[third.offset + 512 :],
        }[cut]
    )
    assert not verify(tmp_path, processes=1, max_bad_ratio=1.0)
    (shard,) = read_manifest(str(tmp_path)).shards
    index = loader_index(shard)
    assert index.keys == ["a", "b"]


def test_webdataset_reads_our_shards_as_the_loader_does(tmp_path: Path) -> None:
    import webdataset

    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for key in ("000000", "000001", "000002"):
            writer.write(key, {"jpg": encoded("JPEG"), "txt": f"caption of {key}".encode(), "json": b"{}"})
    verify(tmp_path, processes=1, max_bad_ratio=0.0)
    shards = read_manifest(str(tmp_path)).shards
    by_webdataset = [
        (sample["__key__"], sample["jpg"], sample["txt"])
        for sample in webdataset.WebDataset([shard.url for shard in shards], shardshuffle=False)
    ]
    by_loader = []
    for shard in shards:
        index, content = loader_index(shard), shard.local_path.read_bytes()
        for key, (image, image_size, text, text_size) in zip(index.keys, index.spans_n4.tolist(), strict=True):
            by_loader.append((key, content[image : image + image_size], content[text : text + text_size]))
    assert by_loader == by_webdataset
    assert len(by_loader) == 3


def test_text_masking_reads_the_word_counts(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards", samples_per_shard=9) as writer:
        for number, caption in enumerate(["a dog", "the dog's dog", "a CAT"]):
            writer.write(f"{number}", {"jpg": encoded("JPEG"), "txt": caption.encode()})
    verify(tmp_path / "shards", processes=1, max_bad_ratio=0.0)
    count_words(tmp_path / "shards", tmp_path / "words.json", min_count=2, processes=1)
    assert read_word_frequencies(str(tmp_path / "words.json")).frequencies == {"a": 2 / 7, "dog": 2 / 7}
