"""Writing tar shards: samples in, numbered tars out, the same bytes for the same input."""

from __future__ import annotations

import contextlib
import io
import math
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from formats.files import sha256_of
from formats.manifest import Shard
from formats.pictures import ImageError, why_unusual
from formats.tar import IMAGE_TYPES

Members = Mapping[str, bytes]  # extension -> content, written in this order

_LONGEST_PLAIN_NAME_BYTES = 100


def add_sample(tar: tarfile.TarFile, key: str, members: Members) -> None:
    """Append `{key}.{extension}` for each member, with neither time nor owner."""
    for extension, content in members.items():
        header = tarfile.TarInfo(f"{key}.{extension}")
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))


def count_unusual(members: Members, into: Counter[str]) -> None:
    """Count a sample's picture that a reader without formats.pictures' rule may see otherwise, by reason."""
    for extension, content in members.items():
        with contextlib.suppress(ImageError):  # the manifest of somebody else may count it as usable
            if extension in IMAGE_TYPES and (why := why_unusual(content)) is not None:
                into[why] += 1


def line_of(path: Path, samples: int, rules: int, unusual: Mapping[str, int]) -> Shard:
    """The manifest line of a shard that was just written, of samples that had passed `rules`."""
    return Shard(path.name, samples, path.stat().st_size, sha256_of(path), rules=rules, unusual=dict(unusual))


class TarWriter:
    """Write samples into one tar. Headers carry no time and no owner, so that equal samples give equal bytes.

    A context manager: leaving it without an error ends the archive.
    """

    def __init__(self, path: Path) -> None:
        self.samples = 0
        self.size_bytes = 0
        self._tar = tarfile.TarFile(path, "w")

    def write(self, key: str, members: Members) -> None:
        """Append one sample: `{key}.{extension}` for each of its members."""
        longest_bytes = max((len(f"{key}.{extension}".encode()) for extension in members), default=0)
        is_plain = longest_bytes <= _LONGEST_PLAIN_NAME_BYTES
        self._tar.format = tarfile.USTAR_FORMAT if is_plain else tarfile.PAX_FORMAT
        add_sample(self._tar, key, members)
        self.samples += 1
        self.size_bytes = self._tar.offset

    def close(self) -> None:
        """End the archive."""
        self._tar.close()

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # after an error, on a full disk say, closing may fail too: the first error counts
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()


class ShardWriter:
    """Write samples into `directory`, a new tar after every `samples_per_shard` or when one reaches `bytes_per_shard`.

    A context manager: leaving it closes the last shard; a tar in the making when an error struck keeps its `.part`
    name. `shard_done` is called with the path of each shard that is complete and the number of its samples.
    """

    def __init__(
        self,
        directory: Path,
        samples_per_shard: int | None = None,
        shard_name: Callable[[int], str] = "{:05d}.tar".format,
        *,
        bytes_per_shard: int | None = None,
        first_shard: int = 0,
        shard_done: Callable[[Path, int], None] | None = None,
    ) -> None:
        self.shards = first_shard
        self.samples = 0
        self._directory = directory
        self._samples_per_shard = samples_per_shard
        self._bytes_per_shard = bytes_per_shard
        self._shard_name = shard_name
        self._shard_done = shard_done
        self._tar: TarWriter | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def samples_in_shard(self) -> int:
        """How many samples the shard in the making holds."""
        return self._tar.samples if self._tar else 0

    def write(self, key: str, members: Members) -> None:
        """Append one sample: `{key}.{extension}` for each of its members."""
        if self._tar is None:
            self._tar = TarWriter(self._part_path())
        self._tar.write(key, members)
        self.samples += 1
        if self._tar.samples == self._samples_per_shard or self._tar.size_bytes >= (self._bytes_per_shard or math.inf):
            self._close_shard()

    def _part_path(self) -> Path:
        return self._directory / (self._shard_name(self.shards) + ".part")

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        tar, path = self._tar, self._directory / self._shard_name(self.shards)
        self._tar = None
        tar.close()
        self._part_path().replace(path)
        self.shards += 1
        if self._shard_done is not None:
            self._shard_done(path, tar.samples)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_shard()
        elif self._tar is not None:
            self._tar.__exit__(kind, error, trace)
