"""Where the samples of a shard lie: read from its tar's headers once, then from a file in the node's cache.

The file holds arrays alone, nothing pickled: `stamp` (the tar's size and time of change when it was indexed), `keys` (a
JSON list, as bytes) and `spans` as in tar_index.SampleIndex. It is believed only where it fits tar and manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import IO

import numpy as np

from formats.errors import UserError
from formats.files import sha256_of
from formats.locks import open_shared
from pipeline.data.manifest import VERIFY_AGAIN, Shard
from pipeline.data.shard_cache import NoRoomError, ShardCache
from pipeline.data.tar_index import SampleIndex, index_samples

_BYTES_PER_SAMPLE = 64  # 32 of offsets and sizes, about as much for a key


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
    except Exception as error:
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
