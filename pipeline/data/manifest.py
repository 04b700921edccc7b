"""The shard directory as `data-prep verify` describes it: manifest.jsonl, one line per shard."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.core import url_to_fs

from pipeline.data.tar_index import SampleIndex, index_samples
from pipeline.errors import UserError

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Shard:
    """One tar: where it is, its usable samples, its size, the keys of samples that are not to be used, and whether
    `verify` found it cut off, so that only what precedes the damage is used.
    """

    url: str
    samples: int
    size_bytes: int
    skip: frozenset[str]
    truncated: bool

    def local_path(self) -> Path:
        """The tar as a local file; a remote one is fetched once into fsspec's cache."""
        filesystem, path = url_to_fs(self.url)
        if "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
            return Path(path)
        return Path(fsspec.open_local(f"filecache::{self.url}"))

    def read_index(self) -> tuple[Path, SampleIndex]:
        """Where the usable samples lie; raises UserError if the shard is not the one that was verified."""
        try:
            path = self.local_path()
            size_bytes = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {self.url} is in the manifest but cannot be read: {error}") from error
        if size_bytes != self.size_bytes:
            raise UserError(f"{self.url} has {size_bytes} bytes, not {self.size_bytes}: {_VERIFY_AGAIN}")
        try:
            index = index_samples(path, self.skip, self.truncated)
        except Exception as error:
            raise UserError(f"{self.url} cannot be read as a tar ({error}): {_VERIFY_AGAIN}") from error
        if self.truncated:
            # what ended verify's reading, a wrong checksum say, need not end this reader's
            index = SampleIndex(index.keys[: self.samples], index.spans_n4[: self.samples])
        if len(index.keys) != self.samples:
            raise UserError(f"{self.url} holds {len(index.keys)} samples, not {self.samples}: {_VERIFY_AGAIN}")
        return path, index


_VERIFY_AGAIN = "it changed since it was verified; run `data-prep verify` on its directory again"


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
        if not filesystem.exists(path):
            raise UserError(f"no shard directory at {directory}: check data.train, or make it with `data-prep`")
        if not filesystem.exists(f"{path}/{MANIFEST}"):
            advice = f"run `data-prep verify {directory}` first"
            if not filesystem.glob(f"{path}/*.tar"):
                advice = "it holds no *.tar either; make shards with `data-prep download` or `data-prep pack`"
            raise UserError(f"{directory} has no {MANIFEST}: {advice}")
        content: bytes = filesystem.cat_file(f"{path}/{MANIFEST}")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot read {directory}/{MANIFEST}: {error}") from error
    shards = tuple(_parse_line(directory, number, line) for number, line in enumerate(content.splitlines(), 1))
    manifest = Manifest(directory, tuple(s for s in shards if s.samples), hashlib.sha256(content).hexdigest())
    if not manifest.num_samples:
        raise UserError(f"{directory} holds no usable sample; `data-prep verify {directory}` says why")
    return manifest


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
            skip=frozenset(fields.get("skip", ())),
            truncated=bool(fields.get("truncated", False)),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{directory}/{MANIFEST} line {number} is not a manifest line ({error!r}); run `data-prep verify` again"
        ) from error
