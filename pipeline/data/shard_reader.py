"""What a loader process reads shards through: some stay open, and those that come next are made ready meanwhile.

Where the samples of a shard lie is read from its tar's headers once, then from a file in the node's cache. That file
holds arrays alone, nothing pickled: `stamp` (the tar's size and time of change when it was indexed), `keys` (a JSON
list, as bytes) and `spans` as in formats.tar.SampleIndex. It is believed only where it fits tar and manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from formats.editions import hash_keys
from formats.errors import UserError
from formats.files import sha256_of
from formats.locks import open_shared
from formats.manifest import VERIFY_AGAIN, Shard
from formats.tar import SampleIndex, index_samples
from pipeline.data.shard_cache import NoRoomError, ShardCache

_RETRY_S = 0.5
_BYTES_PER_SAMPLE = 64  # 32 of offsets and sizes, about as much for a key


class OpenShard:
    """A shard whose index is in memory and whose bytes are read on demand."""

    def __init__(self, shard: Shard, tar: IO[bytes], index: SampleIndex) -> None:
        self.url = shard.url
        self.index = index
        self._is_local = shard.is_local
        self._tar = tar
        self._before = self._state()

    def read(self, sample: int) -> tuple[bytes, bytes]:
        """(image, caption) bytes of the n-th usable sample; raises UserError if the shard changed or cannot be read."""
        image_offset, image_size, text_offset, text_size = self.index.spans_n4[sample].tolist()
        image, text = self._read((image_offset, image_size), (text_offset, text_size))
        return image, text

    def read_caption(self, sample: int) -> bytes:
        """The caption alone, as `read` has it."""
        (text,) = self._read(tuple(self.index.spans_n4[sample, 2:].tolist()))
        return text

    def _read(self, *spans: tuple[int, int]) -> list[bytes]:
        """The bytes of (offset, size) each."""
        descriptor = self._tar.fileno()
        try:
            found = [os.pread(descriptor, size, offset) for offset, size in spans]
            state = self._state()
        except OSError as error:
            raise UserError(f"shard {self.url} can no longer be read: {error.strerror}") from error
        if state != self._before or any(len(part) != size for part, (_, size) in zip(found, spans, strict=True)):
            raise UserError(f"shard {self.url} was changed or removed while it was read")
        return found

    def close(self) -> None:
        """Let go of the file."""
        self._tar.close()

    def _state(self) -> tuple[int, int, bool] | None:
        """What changes if a local tar is written to or removed; a copy in the cache is nobody else's."""
        if not self._is_local:
            return None
        status = os.fstat(self._tar.fileno())
        return status.st_size, status.st_mtime_ns, status.st_nlink > 0


class ShardReader:
    """Shards by their number, for one process after the other, forked or not."""

    def __init__(self, shards: Sequence[Shard], cache: ShardCache) -> None:
        self._shards = shards
        self._cache = cache
        self._open: dict[int, OpenShard] = {}
        self._prefetcher = Prefetcher(cache)

    def open(self, number: int, windows: Callable[[], tuple[Sequence[int], Sequence[int]]]) -> OpenShard:
        """A shard of the present window.

        If it was not open yet, `windows` is asked for the shards of the present window and the next: others are closed,
        and what is missing of these begins to be made ready. Raises UserError if the shard is missing or changed.
        """
        if number not in self._open:
            now, following = windows()
            for other in self._open.keys() - set(now):
                self._open.pop(other).close()
            self._prefetcher.want([self._shards[other] for other in (*now, *following)])
            shard = self._shards[number]
            tar = self._cache.open_tar(shard)
            index = read_index(shard, tar, self._cache)
            _check_keys(shard, index)
            self._open[number] = OpenShard(shard, tar, index)
        return self._open[number]

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Sequence[Shard], ShardCache]]:
        # for processes that are not forked: open files stay behind
        return ShardReader, (self._shards, self._cache)


class Prefetcher:
    """Fetches and indexes shards in a thread, in the order given; each process of a node takes what no other has."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[Shard] = []
        self._newer = threading.Event()

    def want(self, shards: list[Shard]) -> None:
        """Make these ready, and begin no others."""
        if shards == self._wanted:
            return
        self._newer.set()
        self._wanted, self._newer = shards, threading.Event()
        if left := [shard for shard in shards if not self._is_ready(shard)]:
            threading.Thread(target=self._run, args=(left, self._newer), daemon=True).start()

    def _is_ready(self, shard: Shard) -> bool:
        has_tar = shard.is_local or self._cache.tar_path(shard).exists()
        return has_tar and index_path(shard, self._cache).exists()

    def _run(self, left: list[Shard], newer: threading.Event) -> None:
        while left:
            left = [shard for shard in left if not newer.is_set() and not self._make_ready(shard)]
            newer.wait(_RETRY_S)  # others are at what is left, or there is no room for it yet

    def _make_ready(self, shard: Shard) -> bool:
        """Whether there is nothing more to do; what fails here is said when the shard is read."""
        try:
            if not self._cache.prefetch(shard):
                return False
            with self._cache.open_tar(shard) as tar:
                read_index(shard, tar, self._cache)
        except (UserError, OSError):
            pass
        return True


def read_index(shard: Shard, tar: IO[bytes], cache: ShardCache) -> SampleIndex:
    """The usable samples of an open shard, from the cache, into which they are written if they are not there.

    Raises UserError if the shard is not the one that was verified.
    """
    path = index_path(shard, cache)
    stamp = _stamp(shard, tar)
    stored = _load(path, shard)
    if stored is not None:
        if stored[0] == stamp:
            return stored[1]
        _check_content(shard, cache.tar_path(shard))  # its time changed, so its content may have
        path.unlink(missing_ok=True)
    index: SampleIndex | None = None

    def fill(target: IO[bytes]) -> None:
        nonlocal index
        index = index_tar(shard, cache.tar_path(shard))
        _save(target, stamp, index)

    with contextlib.suppress(OSError, NoRoomError):  # it is a convenience
        cache.write(path, 4096 + _BYTES_PER_SAMPLE * shard.samples, fill)
    if index is None and (stored := _load(path, shard)) is not None and stored[0] == stamp:
        index = stored[1]  # another process was faster
    return index or index_tar(shard, cache.tar_path(shard))


def _check_keys(shard: Shard, index: SampleIndex) -> None:
    if shard.edition is not None and hash_keys(index.keys) != shard.edition.keys_sha256:
        raise UserError(
            f"{shard.url} does not hold the keys of the shard of which it is an edition: make the edition again with "
            "`data-prep reshard --image-size`"
        )


def index_path(shard: Shard, cache: ShardCache) -> Path:
    """Where the index of a shard, as its manifest line says to read it, is kept."""
    reading = json.dumps([shard.samples, shard.truncated, sorted(shard.skip)])
    return cache.path(shard, f".{hashlib.sha256(reading.encode()).hexdigest()[:8]}.index.npz")


def index_tar(shard: Shard, path: Path) -> SampleIndex:
    """The usable samples of a shard, by walking the tar's headers.

    Raises UserError if the tar is not the one that was verified.
    """
    try:
        index = index_samples(path, shard.skip, shard.truncated)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard.url} cannot be read as a tar ({error}): {VERIFY_AGAIN}") from error
    if shard.truncated:
        # what ended verify's reading, a wrong checksum say, need not end this reader's
        index = SampleIndex(index.keys[: shard.samples], index.spans_n4[: shard.samples])
    if len(index.keys) != shard.samples:
        raise UserError(f"{shard.url} holds {len(index.keys)} samples, not {shard.samples}: {VERIFY_AGAIN}")
    return index


def _stamp(shard: Shard, tar: IO[bytes]) -> list[int]:
    status = os.fstat(tar.fileno())
    if status.st_size != shard.size_bytes:
        raise UserError(f"{shard.url} has {status.st_size} bytes, not {shard.size_bytes}: {VERIFY_AGAIN}")
    # a copy was compared with the manifest when it was fetched, and its time says when it was used last
    return [status.st_size, status.st_mtime_ns if shard.is_local else 0]


def _check_content(shard: Shard, path: Path) -> None:
    if shard.sha256 and sha256_of(path) != shard.sha256:
        raise UserError(f"{shard.url} has another SHA-256 than in the manifest: {VERIFY_AGAIN}")


def _save(target: IO[bytes], stamp: list[int], index: SampleIndex) -> None:
    content = io.BytesIO()
    keys = np.frombuffer(json.dumps(index.keys).encode(), dtype=np.uint8)
    np.savez(content, stamp=np.array(stamp), keys=keys, spans=index.spans_n4)
    target.write(content.getvalue())
    target.truncate()


def _load(path: Path, shard: Shard) -> tuple[list[int], SampleIndex] | None:
    """(stamp, index), or None if there is none; one that is damaged is removed."""
    file = open_shared(path)
    if file is None:
        return None
    try:
        os.utime(file.fileno())
        with file, np.load(file, allow_pickle=False) as arrays:
            stamp: list[int] = arrays["stamp"].tolist()
            index = SampleIndex(json.loads(arrays["keys"].tobytes()), arrays["spans"])
        if _fits(index, shard):
            return stamp, index
    except Exception:  # whatever numpy, zipfile and json make of a damaged file
        pass
    path.unlink(missing_ok=True)
    return None


def _fits(index: SampleIndex, shard: Shard) -> bool:
    """Whether there are as many samples as the manifest says, all of them inside the tar."""
    spans_n4 = index.spans_n4
    if len(index.keys) != shard.samples or spans_n4.shape != (shard.samples, 4) or spans_n4.dtype != np.int64:
        return False
    offsets_n2, sizes_n2 = spans_n4[:, ::2], spans_n4[:, 1::2]
    return bool((offsets_n2 >= 0).all() and (sizes_n2 >= 0).all() and (offsets_n2 <= shard.size_bytes - sizes_n2).all())
