"""Writing tar shards: samples in, numbered tars out, the same bytes for the same input."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

Members = Mapping[str, bytes]  # extension -> content, written in this order


def add_sample(tar: tarfile.TarFile, key: str, members: Members) -> None:
    """Append `{key}.{extension}` for each member, with neither time nor owner."""
    for extension, content in members.items():
        header = tarfile.TarInfo(f"{key}.{extension}")
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))


class ShardWriter:
    """Write samples into `directory`, a new tar after every `samples_per_shard`.

    Headers carry no time and no owner, so equal samples give equal bytes and equal checksums. A context
    manager: leaving it closes the last shard; a tar in the making when an error struck keeps its `.part` name.
    """

    def __init__(
        self, directory: Path, samples_per_shard: int, shard_name: Callable[[int], str] = "{:05d}.tar".format
    ) -> None:
        self.shards = 0
        self.samples = 0
        self._directory = directory
        self._samples_per_shard = samples_per_shard
        self._shard_name = shard_name
        self._tar: tarfile.TarFile | None = None
        self._samples_in_shard = 0
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, members: Members) -> None:
        """Append one sample: `{key}.{extension}` for each of its members."""
        if self._tar is None:
            self._tar = tarfile.TarFile(self._part_path(), "w", format=tarfile.USTAR_FORMAT)
        add_sample(self._tar, key, members)
        self.samples += 1
        self._samples_in_shard += 1
        if self._samples_in_shard == self._samples_per_shard:
            self._close_shard()

    def _part_path(self) -> Path:
        return self._directory / (self._shard_name(self.shards) + ".part")

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._part_path().replace(self._directory / self._shard_name(self.shards))
        self._tar = None
        self._samples_in_shard = 0
        self.shards += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_shard()
        elif self._tar is not None:
            with contextlib.suppress(OSError):
                self._tar.close()
