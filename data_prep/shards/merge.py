"""Several shard directories -> one, shard by shard, numbered without gaps."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.assembly import (
    Assembly,
    dense_key,
    describe_sources,
    provenance_of,
    read_sources,
    with_key,
)
from data_prep.shards.publish import reading
from data_prep.shards.writer import TarWriter, count_unusual, line_of
from formats.files import replacing
from formats.manifest import Shard, usable_samples


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard to be taken over as number `number` of `folder`."""

    directory: Path
    line: Shard
    folder: Path
    number: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}.tar"


def merge(directories: Sequence[Path], output: Path, processes: int, *, keep_keys: bool = False) -> int:
    """Put the shards of several verified directories into `output`; returns the number of usable samples.

    Samples get keys by their new place, so that none occurs twice, and unusable ones are left out. With `keep_keys`
    the shards are hard-linked, or copied where that is not possible, as they are.

    Raises UserError when a directory is not verified or changed since, or `output` has content.
    """
    with reading(*directories):
        sources = read_sources(directories, output)
        step = {"step": "merge", "sources": describe_sources(directories), "keep_keys": keep_keys}
        assembly = Assembly(output, step)
        tasks = [_Task(directory, line, assembly.folder, number) for number, (directory, line) in enumerate(sources)]
        done = {line.name for line in assembly.done}
        remaining = [task for task in tasks if task.name not in done]
        take = _take_over if keep_keys else _renumber
        with progress_bar("merge", len(tasks), "shard", initial=len(done)) as progress:
            for line in map_in_processes(take, remaining, processes, limit=len(remaining)):
                assembly.add(line)
                progress.update()
        dataset = assembly.finish(provenance_of(directories, step))
    print(f"{output}: {dataset['samples']:,} samples in {dataset['shards']:,} shards")
    return int(dataset["samples"])


def _renumber(task: _Task) -> Shard:
    path, written, unusual = task.folder / task.name, 0, Counter[str]()
    with replacing(path) as temporary, TarWriter(temporary) as tar:
        for sample in usable_samples(task.directory, task.line):
            key = dense_key(task.number, written)
            tar.write(key, with_key(sample.members, key))
            count_unusual(sample.members, unusual)
            written += 1
    return line_of(path, written, task.line.rules, unusual)


def _take_over(task: _Task) -> Shard:
    with replacing(task.folder / task.name) as temporary:
        try:
            os.link(task.directory / task.line.name, temporary)
        except OSError:  # another filesystem, or one without hard links
            shutil.copyfile(task.directory / task.line.name, temporary)
    return dataclasses.replace(task.line, name=task.name)
