"""Making a shard directory out of others: killed on the way, the same command goes on with the shards it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_prep.shards.writer import Members
from formats.errors import UserError
from formats.files import sha256_of, to_json, write_json, write_json_lines
from formats.manifest import MANIFEST, PROVENANCE, Shard, read_manifest, read_provenance, write_manifest

SETTINGS = "settings.json"
NOTES = "done.jsonl"
WORK = "work"


class Assembly:
    """The folder OUTPUT.partial, which becomes OUTPUT when it is complete.

    `done` are the shards that are whole. An assembly of other settings than those of the one found there is begun
    anew.

    Raises UserError when OUTPUT has content.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"{output} is not empty: choose another folder, or delete it")
        self.folder = output.with_name(output.name + ".partial")
        self.work = self.folder / WORK  # for what is needed only on the way
        self._output = output
        self._settings = dict(settings)
        if not self._is_ours():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.work.mkdir(parents=True)
            write_json(self.work / SETTINGS, settings)
        for unfinished in self.folder.glob("*.part"):
            unfinished.unlink()
        self.done = self._read_notes()
        self._notes: TextIO = (self.work / NOTES).open("a", encoding="utf-8")

    def add(self, line: Shard) -> None:
        """Note that a shard of the folder is whole."""
        self.done.append(line)
        # a line of its own even after one that a killed run left unfinished
        self._notes.write(f"\n{json.dumps(line.to_json())}\n")
        self._notes.flush()

    def finish(self, provenance: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write the manifest and give the folder its name; returns what dataset.json says."""
        self._notes.close()
        write_json_lines(self.folder / PROVENANCE, provenance)
        dataset = write_manifest(self.folder, self.done, provenance)
        shutil.rmtree(self.work)
        self.folder.replace(self._output)
        return dataset

    def _is_ours(self) -> bool:
        try:
            found = json.loads((self.work / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == json.loads(json.dumps(self._settings)))

    def _read_notes(self) -> list[Shard]:
        notes = self.work / NOTES
        lines: dict[str, Shard] = {}
        for text in notes.read_bytes().splitlines() if notes.exists() else ():
            try:
                line = Shard.from_json(json.loads(text))
            except ValueError:
                continue  # blank, or left unfinished
            lines[line.name] = line
        return sorted(lines.values(), key=lambda line: line.name)


def read_sources(directories: Sequence[Path], output: Path) -> list[tuple[Path, Shard]]:
    """The shards of several verified directories, in order; raises UserError when one cannot be used."""
    for directory in directories:
        if output.resolve().is_relative_to(directory.resolve()) or directory.resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output {output} and {directory} lie in each other: choose another folder")
    return [(directory, line) for directory in directories for line in read_manifest(directory).shards]


def describe_sources(directories: Sequence[Path]) -> list[dict[str, str]]:
    """Which directories, in which state: goes into the settings of an assembly and into the provenance."""
    return [{"directory": path.name, "manifest_sha256": sha256_of(path / MANIFEST)} for path in directories]


def provenance_of(directories: Sequence[Path], step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps that made each source, then the one that joins them."""
    return [*(line for directory in directories for line in read_provenance(directory)), dict(step)]


def dense_key(shard: int, index: int) -> str:
    """The key of a sample by its place, unique in a directory."""
    return f"{shard:05d}{index:06d}"


def with_key(members: Members, key: str) -> Members:
    """The members of a sample that gets another key: the metadata, if it is of the usual form, says so too."""
    try:
        metadata = json.loads(members["json"])
    except (KeyError, ValueError, RecursionError):
        return members
    if not isinstance(metadata, dict):
        return members
    text = to_json({**metadata, "key": key})
    return {**members, "json": text.encode("utf-8", "replace")}
