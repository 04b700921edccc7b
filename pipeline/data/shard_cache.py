"""A node's copies of shards behind URLs, and of what is known about all shards, in a directory of bounded size.

All workers of all ranks share it. Whoever reads a file in it holds a shared lock, whoever writes one an exclusive lock
on NAME.part, which is renamed once it is whole: what a killed process leaves has no lock and goes when room is needed.
Room is made by removing what nobody reads, longest unused first.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from fsspec.core import split_protocol, url_to_fs

from formats.errors import UserError
from formats.locks import open_exclusive, open_shared, remove_unless_locked
from formats.manifest import VERIFY_AGAIN, Shard
from pipeline.recipe import DataSection

_PART = ".part"
_LOCK = ".lock"
_OURS = re.compile(r"[0-9a-f]{24}\.")  # the directory may hold other things, which are none of our business
_PATIENCE_S = 60.0
_ATTEMPTS = 5
_FIRST_DELAY_S = 0.5
_BLOCK_BYTES = 8 << 20
_FOR_GOOD = (FileNotFoundError, PermissionError)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NoRoomError(Exception):
    """All of the cache is in use."""


class ShardCache:
    """`directory` holds at most `max_bytes`. Raises UserError if the directory cannot be used."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_ours = directory.stat().st_uid == os.getuid() and os.access(directory, os.W_OK)
        except OSError as error:
            raise UserError(f"data.cache_directory {directory} cannot be made: {error.strerror}") from error
        if not is_ours:  # the default is a name that anybody could guess
            raise UserError(f"data.cache_directory {directory} is not yours to write in: name another one")

    def path(self, shard: Shard, kind: str) -> Path:
        """Where something about a shard is: `kind` ends its name."""
        identity = f"{shard.url}\n{shard.size_bytes}\n{shard.sha256}"
        return self._directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}{kind}"

    def open_tar(self, shard: Shard) -> IO[bytes]:
        """A shard to read from, fetched first if need be; a copy stays while it is open.

        Raises UserError that names the shard if it is gone, differs from the manifest, or finds no room.
        """
        if shard.is_local:
            return _open_local(shard)
        try:
            while (file := open_shared(self.tar_path(shard))) is None:
                self._fetch(shard, _PATIENCE_S, wait=True)
            os.utime(file.fileno())  # used now: it is the last to be removed
        except NoRoomError as error:
            raise UserError(f"{error}: raise data.cache_gib, or give this run a directory of its own") from None
        except OSError as error:
            raise UserError(f"{shard.url} cannot be kept in {self._directory}: {error.strerror}") from error
        return file

    def tar_path(self, shard: Shard) -> Path:
        """Where a shard is, or will be once it is fetched."""
        return shard.local_path if shard.is_local else self.path(shard, ".tar")

    def prefetch(self, shard: Shard) -> bool:
        """Fetch a shard unless it is there, without waiting for another process or for room; whether it is there."""
        if shard.is_local or self.tar_path(shard).exists():
            return True
        try:
            return self._fetch(shard, patience_s=0, wait=False)
        except NoRoomError:
            return False

    def _fetch(self, shard: Shard, patience_s: float, wait: bool) -> bool:
        return self.write(
            self.tar_path(shard), shard.size_bytes, lambda target: _download(shard, target), patience_s, wait
        )

    def write(
        self, path: Path, size_bytes: int, fill: Callable[[IO[bytes]], None], patience_s: float = 0, wait: bool = True
    ) -> bool:
        """Make a file of the cache unless it is there, whole or not at all; of several processes that try, one does.

        Returns whether this one did; with `wait`, another one that is at it has ended by then. Raises NoRoomError if
        there is no room within `patience_s`, and what `fill` raises.
        """
        part = path.with_name(path.name + _PART)
        target = open_exclusive(part, wait)
        if target is None:
            return False
        written = False
        with target:
            try:
                if not path.exists():
                    target.truncate(0)  # what a killed process left
                    self._reserve(target, size_bytes, patience_s)
                    fill(target)
                    os.fsync(target.fileno())
                    part.rename(path)
                    written = True
            finally:
                if not written:
                    part.unlink(missing_ok=True)
        return written

    def _reserve(self, target: IO[bytes], size_bytes: int, patience_s: float) -> None:
        """Give a file its size once there is room."""
        deadline_s = time.monotonic() + patience_s
        while not self._make_room(target, size_bytes):
            if time.monotonic() >= deadline_s:
                raise NoRoomError(
                    f"data.cache_directory {self._directory} is full of shards that are read, perhaps by another run"
                )
            time.sleep(0.1)

    def _make_room(self, target: IO[bytes], size_bytes: int) -> bool:
        lock = open_exclusive(self._directory / _LOCK)
        assert lock is not None
        with lock:
            ours = (path for path in self._directory.iterdir() if _OURS.match(path.name))
            files = [(path, status) for path in ours if (status := _status(path)) is not None]
            taken_bytes = sum(status.st_size for _, status in files)
            for path, status in sorted(files, key=lambda file: file[1].st_mtime_ns):
                if taken_bytes + size_bytes <= self._max_bytes:
                    break
                if remove_unless_locked(path):
                    taken_bytes -= status.st_size
            if taken_bytes + size_bytes > self._max_bytes:
                return False
            target.truncate(size_bytes)
            return True


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None  # written or removed since it was listed


def _open_local(shard: Shard) -> IO[bytes]:
    try:
        return shard.local_path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"shard {shard.url} is in the manifest but cannot be read: {error.strerror}") from error


def _download(shard: Shard, target: IO[bytes]) -> None:
    """Write a shard into an empty or larger file, and check its size and, where the manifest has it, its SHA-256.

    What may be transient, a connection that ends say, is tried again, five times over about ten seconds. Raises
    UserError that names the shard.
    """
    for attempt in range(_ATTEMPTS):
        try:
            target.seek(0)
            return _download_once(shard, target)
        except _FOR_GOOD as error:
            raise UserError(f"shard {shard.url} is in the manifest but cannot be read: {error}") from error
        except Exception as error:  # filesystems raise whatever their libraries do
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise UserError(f"{shard.url} cannot be kept in data.cache_directory: {error.strerror}") from error
            if attempt + 1 == _ATTEMPTS:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(f"{shard.url} cannot be fetched, tried {_ATTEMPTS} times: {reason}") from error
            time.sleep(_FIRST_DELAY_S * 2**attempt * random.uniform(0.75, 1.25))
    return None


class _WrongContentError(Exception):
    """What came is not what the manifest describes: cut short on the way, or changed."""


def _download_once(shard: Shard, target: IO[bytes]) -> None:
    digest, size_bytes = hashlib.sha256(), 0
    for block in _read(shard):
        size_bytes += len(block)
        if size_bytes > shard.size_bytes:
            raise _WrongContentError(f"more than its {shard.size_bytes:,} bytes: {VERIFY_AGAIN}")
        digest.update(block)
        target.write(block)
    if size_bytes != shard.size_bytes:
        raise _WrongContentError(f"{size_bytes:,} bytes, not {shard.size_bytes:,}: {VERIFY_AGAIN}")
    if shard.sha256 and digest.hexdigest() != shard.sha256:
        raise _WrongContentError(f"another SHA-256 than in the manifest: {VERIFY_AGAIN}")


def _read(shard: Shard) -> Iterator[bytes]:
    """The content of a shard in blocks."""
    if split_protocol(shard.url)[0] in ("http", "https"):
        import aiohttp

        # aiohttp would end any request after five minutes, however much still comes
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        filesystem, path = url_to_fs(shard.url, client_kwargs={"timeout": timeout})
        # told the size, fsspec does not ask for it first; blocks of 0 are one stream, for not every server has ranges
        source = filesystem.open(path, "rb", block_size=0, size=shard.size_bytes)
    else:
        filesystem, path = url_to_fs(shard.url)
        source = filesystem.open(path, "rb", block_size=_BLOCK_BYTES)
    with source:
        while block := source.read(_BLOCK_BYTES):
            yield block


def make_cache(options: DataSection) -> ShardCache:
    """The node's cache as a recipe wants it."""
    directory = Path(options.cache_directory) if options.cache_directory else default_directory()
    return ShardCache(directory, int(options.cache_gib * 2**30))


def default_directory() -> Path:
    """Where the cache is unless told: in $TMPDIR, where clusters have a node's own disk."""
    return Path(tempfile.gettempdir()) / f"cluster-clip-{os.getuid()}"


def check_room(shards: Sequence[Shard], options: DataSection, num_sets: int, samples_ahead: int) -> None:
    """Raise UserError, with the arithmetic, if the shards that are open at once do not fit into the cache.

    num_sets: each has a window of its own
    samples_ahead: how far apart in the order of samples the processes of a node may be
    """
    remote = [shard for shard in shards if not shard.is_local]
    if not remote:
        return
    num_open = 2 * num_sets * options.window_shards
    open_bytes = sum(sorted(shard.size_bytes for shard in remote)[-num_open:])
    ahead_bytes = math.ceil(samples_ahead * max(shard.size_bytes / shard.samples for shard in remote))
    total_bytes = sum(shard.size_bytes for shard in remote)
    if min(total_bytes, open_bytes + ahead_bytes) > options.cache_gib * 2**30:
        raise UserError(
            f"data.cache_gib {options.cache_gib:g} is too small: two windows of data.window_shards="
            f"{options.window_shards} shards of each set take up to {_gib(open_bytes)}, {samples_ahead:,} samples read "
            f"ahead up to {_gib(ahead_bytes)} (all shards {_gib(total_bytes)}): raise it, or take smaller windows"
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"
