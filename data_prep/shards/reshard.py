"""Shards of another size, shuffled, or a subset: verified directories in, a verified directory out."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import simplejpeg
from PIL import Image

from data_prep.console import progress_bar
from data_prep.shards.assembly import (
    Assembly,
    dense_key,
    describe_sources,
    provenance_of,
    read_sources,
    with_key,
)
from data_prep.shards.publish import reading
from data_prep.shards.shuffle import BucketShuffle
from data_prep.shards.uid_list import UidList, read_uids
from data_prep.shards.writer import Members, ShardWriter, count_unusual, line_of
from formats.errors import UserError
from formats.files import sha256_of
from formats.manifest import Shard, usable_samples
from formats.pictures import ImageError, decode_picture, picture_format, why_unusual
from formats.tar import IMAGE_TYPES

Source = tuple[Path, Shard]
QUALITY = 95  # of JPEGs that are written anew


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the new shards are cut: after so many samples, or at so many bytes; shuffled if there is a `seed`.

    normalise: write pictures that other readers may see otherwise as all see them
    """

    samples_per_shard: int | None = None
    bytes_per_shard: int | None = None
    seed: int | None = None
    memory_bytes: int = 1_000_000_000
    normalise: bool = False


def reshard(directories: Sequence[Path], output: Path, layout: Layout, uids_file: Path | None = None) -> int:
    """Write the usable samples of verified directories into new shards in `output`; returns their number.

    With `uids_file` only the samples whose metadata has a listed `uid`, as often as it is listed. Keys are given anew.
    Interrupted, the same command goes on.

    Raises UserError when a directory is not verified or changed since, no sample is left, or `output` has content.
    """
    uids = read_uids(uids_file) if uids_file is not None else None
    with reading(*directories):
        sources = read_sources(directories, output)
        step = {"step": "reshard", "sources": describe_sources(directories), **dataclasses.asdict(layout)}
        if uids_file is not None:
            step |= {"uids": uids_file.name, "uids_sha256": sha256_of(uids_file)}
        assembly = Assembly(output, step)
        rules = min((line.rules for _, line in sources), default=0)
        _write(_in_order(sources, assembly.work, layout, uids), assembly, layout, rules)
        if not assembly.done:
            raise UserError("no sample is left: the directories hold none, or none whose uid is listed")
        dataset = assembly.finish(provenance_of(directories, step))
    print(f"{output}: {dataset['samples']:,} samples in {dataset['shards']:,} shards")
    return int(dataset["samples"])


def _write(samples: Generator[Members, None, None], assembly: Assembly, layout: Layout, rules: int) -> None:
    """Write what is not there yet: the samples come in the same order every time."""
    already = sum(line.samples for line in assembly.done)
    unusual = Counter[str]()  # of the shard in the making

    def shard_done(path: Path, count: int) -> None:
        assembly.add(line_of(path, count, rules, unusual))
        unusual.clear()

    with (
        ShardWriter(
            assembly.folder,
            layout.samples_per_shard,
            bytes_per_shard=layout.bytes_per_shard,
            first_shard=len(assembly.done),
            shard_done=shard_done,
        ) as writer,
        contextlib.closing(samples),
    ):  # its progress bar ends before an error is shown
        for members in itertools.islice(samples, already, None):
            key = dense_key(writer.shards, writer.samples_in_shard)
            members = normalised(members) if layout.normalise else members
            count_unusual(members, unusual)
            writer.write(key, with_key(members, key))


def normalised(members: Members) -> Members:
    """The members with a picture that every reader sees alike, upright, on white, RGB of 8 bits; most are so already.

    A JPEG stays one, of quality 95; others become PNGs, which lose nothing. What does not decode stays as it is.
    """
    found: dict[str, bytes] = {}
    for kind, content in members.items():
        try:
            is_unusual = kind in IMAGE_TYPES and why_unusual(content) is not None
            found |= _rewritten(content) if is_unusual else {kind: content}
        except ImageError:
            found[kind] = content
    return found


def _rewritten(picture: bytes) -> dict[str, bytes]:
    pixels_HWC = decode_picture(picture)
    if picture_format(picture) == "jpg":
        return {"jpg": simplejpeg.encode_jpeg(pixels_HWC, quality=QUALITY, colorsubsampling="420")}
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC).save(stream, "PNG")
    return {"png": stream.getvalue()}


def _in_order(
    sources: Sequence[Source], work: Path, layout: Layout, uids: UidList | None
) -> Generator[Members, None, None]:
    def read(source: Source) -> Iterator[Members]:
        for sample in usable_samples(*source):
            yield from itertools.repeat(sample.members, 1 if uids is None else uids.count(_uid(sample.members)))

    total_bytes = sum(line.size_bytes for _, line in sources)
    if layout.seed is None:
        with progress_bar("reshard", total_bytes, "B") as progress:
            for source in sources:
                yield from read(source)
                progress.update(source[1].size_bytes)
        return
    shuffle = BucketShuffle(work, total_bytes, layout.memory_bytes, layout.seed)
    with progress_bar("read", total_bytes, "B") as progress:
        for source in shuffle.scatter(sources, read):
            progress.update(source[1].size_bytes)
    with progress_bar("write", shuffle.size_bytes, "B") as progress:
        for members in shuffle.gather():
            yield members
            progress.update(sum(map(len, members.values())))


def _uid(members: Members) -> str:
    try:
        metadata = json.loads(members.get("json", b"null"))
    except (ValueError, RecursionError):
        return ""
    return str(metadata.get("uid", "")) if isinstance(metadata, dict) else ""
