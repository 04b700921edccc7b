"""Changing a shard directory in one step: whoever is killed on the way leaves the old state or the new one.

New files are staged in DIRECTORY/.staged. Then a journal says what becomes of them: from that moment the change is
decided, and what the process can no longer do, the next command on the directory does first. Renames alone carry it
out, each of which may be repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import flush_to_disk, read_json_lines, write_atomically, write_json_lines
from formats.locks import holder_of, try_lock
from formats.manifest import DATASET, MANIFEST, PROVENANCE, Shard, check_directory, write_manifest

STAGED = ".staged"
JOURNAL = "journal.json"
QUARANTINE = "quarantine"


@contextlib.contextmanager
def changing(directory: Path) -> Iterator[Path]:
    """Give the empty folder in which to stage new files; what an interrupted command had decided is done first.

    Raises UserError when another command is changing the directory.
    """
    check_directory(directory)
    with _locked(directory):
        _finish(directory)
        staged = directory / STAGED
        staged.mkdir()
        try:
            yield staged
        finally:
            _finish(directory)


@contextlib.contextmanager
def reading(*directories: Path) -> Iterator[None]:
    """Keep directories as they are while they are read; what an interrupted command had decided is done first.

    Raises UserError when another command is changing one of them.
    """
    with contextlib.ExitStack() as locks:
        for directory in directories:
            if (directory / STAGED / JOURNAL).exists():
                with changing(directory):
                    pass
            check_directory(directory)
            locks.enter_context(_locked(directory, shared=True))
        yield


@contextlib.contextmanager
def adding(directory: Path) -> Iterator[None]:
    """While new shards come: others may add too, and nobody changes what is there.

    Raises UserError when another command is changing the directory.
    """
    with _locked(directory, shared=True):
        yield


def publish(
    directory: Path,
    lines: Sequence[Shard],
    *,
    shards: Collection[str] = (),
    quarantine: Collection[str] = (),
    records: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Make `lines` the manifest and the staged `shards` part of the directory; returns what dataset.json says.

    The present files of the shards in `quarantine` are kept in the folder of that name. `records` are lines to add
    to JSON-lines files of the directory. Call it within `changing`.
    """
    staged = directory / STAGED
    records = records or {}
    for name, added in records.items():
        write_json_lines(staged / name, [*read_json_lines(directory / name), *added])
    source = read_json_lines((staged if PROVENANCE in records else directory) / PROVENANCE)
    dataset = write_manifest(staged, lines, source)
    published = [*shards, *records, MANIFEST, DATASET]
    for name in published:
        flush_to_disk(staged / name)
    journal = {"publish": published, "quarantine": {name: _free_name(directory, name) for name in quarantine}}
    write_atomically(staged / JOURNAL, json.dumps(journal))
    flush_to_disk(staged)
    _carry_out(directory)
    return dataset


def _finish(directory: Path) -> None:
    staged = directory / STAGED
    if (staged / JOURNAL).exists():
        _carry_out(directory)
    shutil.rmtree(staged, ignore_errors=True)
    if staged.exists():
        raise UserError(f"cannot remove {staged}: check the permissions of {directory}")


def _carry_out(directory: Path) -> None:
    """Do what the journal says. Each step leaves a trace by which a repetition knows that it was done."""
    staged = directory / STAGED
    journal = json.loads((staged / JOURNAL).read_text(encoding="utf-8"))
    for name, kept_as in journal["quarantine"].items():
        if not (directory / kept_as).exists():
            (directory / QUARANTINE).mkdir(exist_ok=True)
            (directory / name).rename(directory / kept_as)
    for name in journal["publish"]:
        if (staged / name).exists():
            (staged / name).replace(directory / name)
    flush_to_disk(directory)
    (staged / JOURNAL).unlink()


def _free_name(directory: Path, shard: str) -> str:
    """Where in the quarantine a shard goes; an earlier one of its name stays."""
    number, name = 1, f"{QUARANTINE}/{shard}"
    while (directory / name).exists():
        number += 1
        name = f"{QUARANTINE}/{Path(shard).stem}-{number}.tar"
    return name


@contextlib.contextmanager
def _locked(directory: Path, shared: bool = False) -> Iterator[None]:
    """Hold the directory against other commands; the lock ends with the process, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if not try_lock(descriptor, directory, shared):
            holder = holder_of(descriptor)
            raise UserError(f"another data-prep command works on {directory}, {holder}: wait until it has ended")
        yield
    finally:
        os.close(descriptor)
