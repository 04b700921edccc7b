"""A second edition of a shard directory, with smaller pictures: the same shards, samples and keys in the same order."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.assembly import Assembly, describe_sources, provenance_of, read_sources
from data_prep.shards.publish import reading
from data_prep.shards.reshard import normalised
from data_prep.shards.writer import Members, TarWriter, count_unusual, line_of
from formats.editions import Edition, hash_keys
from formats.errors import UserError
from formats.files import replacing
from formats.manifest import Shard, read_manifest, usable_samples
from formats.pictures import ImageError, decode_picture, read_header
from formats.tar import IMAGE_TYPES


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard to be written anew in `folder`; `source_sha256` and `num_shards` are those of its directory."""

    directory: Path
    line: Shard
    folder: Path
    image_size: int
    quality: int
    source_sha256: str
    num_shards: int


def write_edition(directory: Path, output: Path, image_size: int, quality: int, processes: int) -> int:
    """Write the usable samples of a verified directory, shorter sides of pictures scaled down to `image_size` pixels.

    A picture that is no larger keeps its bytes, unless other readers may see it otherwise (`normalised`); so does one
    that does not decode, for every sample keeps its place. Interrupted, the same command goes on. Returns the number
    of samples.

    Raises UserError when the directory is not verified or changed since, holds no sample, or `output` has content.
    """
    with reading(directory):
        lines = [line for _, line in read_sources([directory], output) if line.samples]
        if not lines:
            raise UserError(f"{directory} holds no usable sample")
        settings = {"image_size": image_size, "quality": quality}
        step = {"step": "reshard", "sources": describe_sources([directory]), **settings}
        assembly = Assembly(output, step)
        done = {line.name for line in assembly.done}
        source_sha256 = read_manifest(directory).sha256
        tasks = [
            _Task(directory, line, assembly.folder, image_size, quality, source_sha256, len(lines))
            for line in lines
            if line.name not in done
        ]
        with progress_bar("reshard", len(lines), "shard", initial=len(done)) as progress:
            for line in map_in_processes(_write_shard, tasks, processes, limit=len(tasks)):
                assembly.add(line)
                progress.update()
        dataset = assembly.finish(provenance_of([directory], step))
    before = sum(line.size_bytes for line in lines)
    print(
        f"{output}: {dataset['samples']:,} samples in {dataset['shards']:,} shards, {dataset['bytes']:,} bytes where "
        f"{directory} has {before:,}"
    )
    return int(dataset["samples"])


def _write_shard(task: _Task) -> Shard:
    path, keys, unusual = task.folder / task.line.name, [], Counter[str]()
    with replacing(path) as temporary, TarWriter(temporary) as tar:
        for sample in usable_samples(task.directory, task.line):
            members = with_small_picture(sample.members, task.image_size, task.quality)
            tar.write(sample.key, members)
            count_unusual(members, unusual)
            keys.append(sample.key)
    edition = Edition(task.source_sha256, task.num_shards, hash_keys(keys))
    return dataclasses.replace(line_of(path, len(keys), task.line.rules, unusual), edition=edition)


def with_small_picture(members: Members, image_size: int, quality: int) -> Members:
    """The members with a picture whose shorter side is at most `image_size` pixels."""
    found: dict[str, bytes] = {}
    for kind, content in members.items():
        smaller = _smaller(content, image_size, quality) if kind in IMAGE_TYPES else None
        found |= {kind: content} if smaller is None else {"jpg": smaller}
    return normalised(found)


def _smaller(picture: bytes, image_size: int, quality: int) -> bytes | None:
    """A JPEG of that size, its longer side to the nearest pixel; None for what is no larger or no picture.

    Decoded whole and scaled by Lanczos: decoding to half the size takes a third of the time, and is a fifth further
    from what the loader would have made of the source (docs/log.md).
    """
    try:
        header = read_header(picture)
        if min(header.width, header.height) <= image_size:
            return None
        pixels_HWC = decode_picture(picture)
    except ImageError:
        return None
    scale = image_size / min(pixels_HWC.shape[:2])
    height, width = (round(side * scale) for side in pixels_HWC.shape[:2])
    scaled = Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.LANCZOS)
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(scaled), quality=quality, colorsubsampling="420")
    return encoded
