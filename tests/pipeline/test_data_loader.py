"""Tars, manifests and batches: the same samples as Python's own tar reader gives, bad ones replaced and counted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import jpeg_bytes, write_shards, write_tar

from formats.errors import UserError
from formats.manifest import read_manifest
from formats.tar import index_samples, read_members
from pipeline.data.captions import load_tokenizer
from pipeline.data.data_loader import MicroBatches, TrainingSet, collate, make_loader
from pipeline.data.sample_order import BatchPlan
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import read_training_data
from pipeline.recipe import DataSection, TextMaskingSection


def dataset(directory: Path | str, tokenizer_file: Path, seed: int = 0) -> TrainingSet:
    section = DataSection(train=str(directory), window_shards=2)
    data = read_training_data(section)
    text_masker = TextMasker(load_tokenizer(str(tokenizer_file), 64), TextMaskingSection())
    return TrainingSet(
        ShardReader(data.shards, make_cache(section)), data.order(section, seed), seed, text_masker, 16, 0.9
    )


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_tarfiles_own(tmp_path: Path, tar_format: int) -> None:
    path = tmp_path / "a.tar"
    names = ["a.jpg", "folder/b.txt", "x" * 95 + ".jpg", "f" * 90 + "/" + "g" * 80 + ".txt", "ünïcode.jpg", "empty.txt"]
    if tar_format != tarfile.USTAR_FORMAT:
        names.append("h" * 140 + ".jpg")
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = 0 if name.startswith("empty") else 700
            header.mtime = 1700000000.25  # PAX writes an extended header for a fraction, as img2dataset's tars have
            tar.addfile(header, io.BytesIO(b"z" * header.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("last.txt"))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [tuple(member) for member in read_members(path)] == expected


def test_a_cut_off_tar_is_an_error_at_every_length(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 600), ("a.txt", b"2")])
    whole = (tmp_path / "a.tar").read_bytes()
    for length in [0, 100, 512, 800, 1536, 2048, 2100, 2560]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises((tarfile.TarError, OSError)):
            read_members(tmp_path / "cut.tar")


def test_index_takes_complete_samples_and_leaves_out_the_rest(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"A"), ("a.txt", b"aa"), ("a.json", b"{}"),
        ("b.txt", b"no image"),
        ("c.PNG", b"C"), ("c.txt", b"cc"), ("c.pkl", b"never read"),
        ("d.jpg", b"no caption"),
        ("dir/e.seg.jpg", b"another type"), ("dir/e.txt", b"x"),
        ("skipped.jpg", b"S"), ("skipped.txt", b"s"),
        ("z.webp", b"Z"), ("z.txt", b"zz"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    index = index_samples(tmp_path / "a.tar", skip={"skipped"})
    assert index.keys == ["a", "c", "z"]
    content = (tmp_path / "a.tar").read_bytes()
    texts = [content[offset : offset + size] for _, _, offset, size in index.spans_n4.tolist()]
    assert texts == [b"aa", b"cc", b"zz"]


def test_batches_do_not_depend_on_workers(shards: Path, tokenizer_file: Path) -> None:
    data = dataset(shards, tokenizer_file)
    plan = BatchPlan(96, 16, 8, 2)
    batches = [list(make_loader(data, MicroBatches(plan, 1, 0, 12), workers, False)) for workers in (0, 2)]
    assert len(batches[0]) == 12
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.images_BCHW, b.images_BCHW)
        assert torch.equal(a.tokens_N, b.tokens_N)
        assert torch.equal(a.cu_seqlens_B1, b.cu_seqlens_B1)
    assert batches[0][0].images_BCHW.shape == (8, 3, 16, 16)
    assert batches[0][0].images_BCHW.dtype == torch.uint8
    assert [a.keys for a in batches[0]] == [b.keys for b in batches[1]]
    # from the middle, as after a resume
    rest = list(make_loader(data, MicroBatches(plan, 1, 7, 12), 0, False))
    assert all(torch.equal(a.tokens_N, b.tokens_N) for a, b in zip(batches[0][7:], rest, strict=True))


def test_an_epoch_reads_every_caption_once(shards: Path, tokenizer_file: Path) -> None:
    data, tokenizer = dataset(shards, tokenizer_file), load_tokenizer(str(tokenizer_file), 64)
    seen = sorted(tuple(data[position].token_ids) for position in range(3 * 96, 4 * 96))
    animals = ["cat", "dog", "bird"]
    expected = sorted(tuple(tokenizer.encode(f"picture number {n} of a {animals[n % 3]}")) for n in range(96))
    assert seen == expected


def test_bad_samples_are_replaced_and_named(tmp_path: Path, tokenizer_file: Path) -> None:
    truncated = jpeg_bytes(1)[:-200]
    bad = {"00000001.jpg": truncated, "00000002.txt": b"  ", "00000003.txt": b"\xff\xfe", "00000011.jpg": b"<html>"}
    data = dataset(write_shards(tmp_path, [12], bad), tokenizer_file)
    samples = [data[position] for position in range(12)]
    problems = [problem for sample in samples for problem in sample.problems]
    for key in ("00000001", "00000002", "00000003", "00000011"):
        assert any(f"00000.tar: {key}" in problem for problem in problems)
    assert len({tuple(sample.token_ids) for sample in samples}) == 8
    batch = collate(samples)
    assert len(batch.problems) == len(problems)
    # the keys are those of the samples that are in the batch, not of those that they stand in for
    usable = [f"{number:08d}" for number in range(12) if number not in (1, 2, 3, 11)]
    assert {key.partition("00000.tar: ")[2] for key in batch.keys} == set(usable)
    assert [sample.key for sample in samples] == batch.keys


def test_a_shard_without_any_usable_sample_is_an_error(tmp_path: Path, tokenizer_file: Path) -> None:
    data = dataset(write_shards(tmp_path, [3], {f"0000000{n}.jpg": b"no" for n in range(3)}), tokenizer_file)
    with pytest.raises(UserError, match="3 samples in a row"):
        data[0]


def test_shards_that_changed_since_they_were_verified(tmp_path: Path, tokenizer_file: Path) -> None:
    directory = write_shards(tmp_path / "shards", [4])
    shard, manifest = directory / "00000.tar", directory / "manifest.jsonl"
    content, line = shard.read_bytes(), json.loads(manifest.read_text())
    shard.write_bytes(content[:-512])
    with pytest.raises(UserError, match=r"has \d+ bytes, not \d+"):
        dataset(directory, tokenizer_file)[0]
    shard.write_bytes(content)
    manifest.write_text(json.dumps(line | {"samples": 5}) + "\n")
    with pytest.raises(UserError, match="holds 4 samples, not 5"):
        dataset(directory, tokenizer_file)[0]
    manifest.write_text(json.dumps(line | {"samples": 3, "skip": ["00000002"]}) + "\n")
    captions = {tuple(dataset(directory, tokenizer_file)[position].token_ids) for position in range(3)}
    assert len(captions) == 3
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        dataset(directory, tokenizer_file)[0]


def test_manifest_errors_name_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        read_training_data(DataSection(train=""))
    with pytest.raises(UserError, match="no shard directory at"):
        read_manifest(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"holds no \*\.tar"):
        read_manifest(str(tmp_path))
    write_tar(tmp_path / "00000.tar", [("a.jpg", b"")])
    with pytest.raises(UserError, match="data-prep verify"):
        read_manifest(str(tmp_path))
    for line in ("{", '{"shard": "../../x.tar", "samples": 1, "bytes": 1}', '{"shard": "a.tar"}', "[]"):
        (tmp_path / "manifest.jsonl").write_text(line)
        with pytest.raises(UserError, match="line 1"):
            read_manifest(str(tmp_path))
    (tmp_path / "manifest.jsonl").write_text('{"shard": "a.tar", "samples": 0, "bytes": 1}\n')
    with pytest.raises(UserError, match="no usable sample"):
        read_training_data(DataSection(train=str(tmp_path)))


def test_shards_behind_a_url_are_fetched(tmp_path: Path, tokenizer_file: Path) -> None:
    import fsspec

    directory = write_shards(tmp_path, [5])
    memory = fsspec.filesystem("memory")
    for path in directory.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    remote, local = dataset("memory://bucket", tokenizer_file), dataset(directory, tokenizer_file)
    for position in range(5):
        assert remote[position].token_ids == local[position].token_ids
