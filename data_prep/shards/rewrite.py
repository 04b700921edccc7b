"""Leaving samples out of shards: the one way in which a command removes anything from a shard directory."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import publish
from data_prep.shards.writer import TarWriter, count_unusual, line_of
from formats.errors import UserError
from formats.manifest import PROVENANCE, Shard, read_manifest, usable_samples

BATCH_BYTES = 4 << 30  # disk that may be needed besides the shards: so much is staged before it is published


@dataclasses.dataclass(frozen=True)
class Removal:
    """What to leave out of one shard, and what to write down about it.

    `records` are lines for the command's record file. If `keep_original`, the shard as it was goes to the quarantine,
    and has no successor when nothing usable is left of it.
    """

    line: Shard
    keys: frozenset[str] = frozenset()
    records: Sequence[Mapping[str, Any]] = ()
    keep_original: bool = False


@dataclasses.dataclass(frozen=True)
class _Rewritten:
    """A staged shard and what it was made from."""

    removal: Removal
    line: Shard

    @property
    def samples_removed(self) -> int:
        before = self.removal.line
        return before.samples + before.skipped_samples - self.line.samples

    @property
    def has_successor(self) -> bool:
        return self.line.samples > 0 or not self.removal.keep_original


def check_removed(removed: int, samples: int, max_removed: float) -> None:
    """Raise UserError, before anything is changed, if more than a share of the samples would be removed."""
    if removed > max_removed * samples:
        enough = math.ceil(100 * removed / samples) / 100
        raise UserError(
            f"{removed:,} of {samples:,} samples would be removed, more than --max-removed {max_removed:g} allows: "
            f"nothing was removed; if they are all meant, pass --max-removed {enough:g}"
        )


def rewrite_shards(
    directory: Path,
    staged: Path,
    removals: Iterable[Removal],
    step: Mapping[str, Any],
    processes: int,
    count: int,
    records_name: str | None = None,
) -> int:
    """Leave samples out of `count` shards and publish what remains, batch by batch; returns how many were left out.

    A rewritten shard holds nothing but usable samples. `staged` comes from `changing(directory)`. Each batch adds a
    line with the fields of `step` to provenance.jsonl, and the removals' records to the file `records_name`.

    Raises UserError when a shard is not the one that the manifest describes.
    """
    lines = {line.name: line for line in read_manifest(directory).shards}
    removed = 0
    stage = functools.partial(_stage, directory, staged)
    for batch in _batches(map_in_processes(stage, removals, processes, limit=count), count):
        for shard in batch:
            lines.pop(shard.line.name)
            if shard.has_successor:
                lines[shard.line.name] = shard.line
        left_out = sum(shard.samples_removed for shard in batch)
        records = {PROVENANCE: [{**step, "shards": len(batch), "samples_removed": left_out}]}
        if records_name is not None:
            records[records_name] = [dict(record) for shard in batch for record in shard.removal.records]
        publish(
            directory,
            list(lines.values()),
            shards=[shard.line.name for shard in batch if shard.has_successor],
            quarantine=[shard.line.name for shard in batch if shard.removal.keep_original],
            records=records,
        )
        removed += left_out
    return removed


def _batches(shards: Iterator[_Rewritten], count: int) -> Iterator[list[_Rewritten]]:
    batch: list[_Rewritten] = []
    with progress_bar("rewrite", count, "shard") as progress:
        for shard in shards:
            progress.update()
            batch.append(shard)
            if sum(shard.line.size_bytes for shard in batch) >= BATCH_BYTES:
                yield batch
                batch = []
    if batch:
        yield batch


def _stage(directory: Path, staged: Path, removal: Removal) -> _Rewritten:
    """Write the shard anew without what is to be left out."""
    target, written, unusual = staged / removal.line.name, 0, Counter[str]()
    with TarWriter(target) as tar:
        for sample in usable_samples(directory, removal.line):
            if sample.key not in removal.keys:
                tar.write(sample.key, sample.members)
                count_unusual(sample.members, unusual)
                written += 1
    return _Rewritten(removal, line_of(target, written, removal.line.rules, unusual))
