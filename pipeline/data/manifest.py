"""The shard directory as `data-prep verify` describes it: manifest.jsonl, one line per shard."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from formats.errors import UserError

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Shard:
    """One tar: where it is, its usable samples, its size and SHA-256 (None if whoever wrote the manifest left it out),
    the keys of samples that are not to be used, and whether `verify` found it cut off, so that only what precedes the
    damage is used.
    """

    url: str
    samples: int
    size_bytes: int
    sha256: str | None
    skip: frozenset[str]
    truncated: bool

    @property
    def is_local(self) -> bool:
        """Whether the tar is a file of this machine, or of a filesystem that it mounts."""
        return split_protocol(self.url)[0] in (None, "file", "local")

    @property
    def local_path(self) -> Path:
        """Where a local tar is."""
        return Path(LocalFileSystem._strip_protocol(self.url))


VERIFY_AGAIN = "it changed since it was verified; run `data-prep verify` on its directory again"


@dataclass(frozen=True)
class Manifest:
    """All shards of a directory; `sha256` of the manifest file names the data set in a run's records."""

    directory: str
    shards: tuple[Shard, ...]
    sha256: str

    @property
    def num_samples(self) -> int:
        """Usable samples of all shards."""
        return sum(shard.samples for shard in self.shards)


def read_manifest(directory: str) -> Manifest:
    """Read DIRECTORY/manifest.jsonl, local or remote.

    Raises UserError if the directory or its manifest is missing or holds no sample, naming the next command.
    """
    directory = directory.rstrip("/")
    if not directory:
        raise UserError("no training data: give data.train=SHARD_DIRECTORY (make one with `data-prep`)")
    try:
        filesystem, path = url_to_fs(directory)
        try:
            content: bytes = filesystem.cat_file(f"{path}/{MANIFEST}")
        except FileNotFoundError:
            raise UserError(_what_is_missing(directory, filesystem, path)) from None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot read {directory}/{MANIFEST}: {error}") from error
    shards = tuple(_parse_line(directory, number, line) for number, line in enumerate(content.splitlines(), 1))
    manifest = Manifest(directory, tuple(s for s in shards if s.samples), hashlib.sha256(content).hexdigest())
    if not manifest.num_samples:
        raise UserError(f"{directory} holds no usable sample; `data-prep verify {directory}` says why")
    return manifest


def _what_is_missing(directory: str, filesystem: AbstractFileSystem, path: str) -> str:
    if not filesystem.exists(path):
        return f"no shard directory at {directory}: check data.train, or make it with `data-prep`"
    advice = f"run `data-prep verify {directory}` first"
    if not filesystem.glob(f"{path}/*.tar"):
        advice = "it holds no *.tar either; make shards with `data-prep download` or `data-prep pack`"
    return f"{directory} has no {MANIFEST}: {advice}"


def _parse_line(directory: str, number: int, line: bytes) -> Shard:
    try:
        fields = json.loads(line)
        name = str(fields["shard"])
        if "/" in name or not name.endswith(".tar"):
            raise ValueError(f"shard name {name!r}")
        return Shard(
            url=f"{directory}/{name}",
            samples=int(fields["samples"]),
            size_bytes=int(fields["bytes"]),
            sha256=fields.get("sha256"),
            skip=frozenset(fields.get("skip", ())),
            truncated=bool(fields.get("truncated", False)),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{directory}/{MANIFEST} line {number} is not a manifest line ({error!r}); run `data-prep verify` again"
        ) from error
