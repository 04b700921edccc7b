"""Shards behind URLs: read from start to end, checked, tried again."""

from __future__ import annotations

import errno
import hashlib
import random
import time
from collections.abc import Iterator
from typing import IO

from fsspec.core import split_protocol, url_to_fs

from formats.errors import UserError
from pipeline.data.manifest import VERIFY_AGAIN, Shard

_ATTEMPTS = 5
_FIRST_DELAY_S = 0.5
_BLOCK_BYTES = 8 << 20
_FOR_GOOD = (FileNotFoundError, PermissionError)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def download(shard: Shard, target: IO[bytes]) -> None:
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
