"""Random access to the samples of an uncompressed tar: where each image and caption lies, from the headers alone.

Nothing is extracted or unpickled; only the member types below are ever read.
"""

from __future__ import annotations

import mmap
import tarfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGE_TYPES = frozenset({"jpg", "jpeg", "png", "webp"})
CAPTION_TYPE = "txt"

_BLOCK = 512
_PLAIN_FILES = (b"0", b"\0")


class Member(NamedTuple):
    """A regular file in a tar: its name and the stretch of bytes that is its content."""

    name: str
    offset_bytes: int
    size_bytes: int


class NotPlainTarError(Exception):
    """The fast reader met a header it does not know; the standard library's reader must be asked."""


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the last path component; types compare in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


def read_members(path: Path, up_to_damage: bool = False) -> list[Member]:
    """Regular files of an uncompressed tar in order.

    Raises tarfile.TarError or OSError if it is damaged or cut off, unless what precedes the damage is wanted.
    """
    if path.stat().st_size == 0:
        raise tarfile.ReadError("empty file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _collect(_plain_members(data), up_to_damage)
    except NotPlainTarError:
        return _collect(_members_by_tarfile(path), up_to_damage)


def _collect(members: Iterator[Member], up_to_damage: bool) -> list[Member]:
    found: list[Member] = []
    try:
        found.extend(members)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError):
        if not up_to_damage:
            raise
    return found


def _members_by_tarfile(path: Path) -> Iterator[Member]:
    end = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            padded_end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if padded_end > end:
                raise tarfile.ReadError("cut off inside a member")
            if member.isreg() and not member.issparse():
                yield Member(member.name, member.offset_data, member.size)
        if tar.fileobj is None or end < tar.offset + _BLOCK:  # type: ignore[attr-defined]
            raise tarfile.ReadError("no end-of-archive mark: cut off")


def _plain_members(data: mmap.mmap) -> Iterator[Member]:
    """Walk ustar headers, 7 to 11 times as fast as `tarfile`; extended headers that matter are left to it."""
    offset, end = 0, len(data)
    while offset + _BLOCK <= end:
        header = data[offset : offset + _BLOCK]
        if header[0] == 0:
            return
        kind, offset = header[156:157], offset + _BLOCK
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError as error:
            raise NotPlainTarError from error
        if offset + size > end:
            raise tarfile.ReadError("cut off inside a member")
        if kind in _PLAIN_FILES:
            prefix = header[345:500].rstrip(b"\0") if header[257:262] == b"ustar" else b""
            name = header[:100].rstrip(b"\0")
            yield Member((prefix + b"/" + name if prefix else name).decode("utf-8", "replace"), offset, size)
        elif kind == b"x":
            records = data[offset : offset + size]
            if b" path=" in records or b" size=" in records or b"sparse" in records:
                raise NotPlainTarError
        elif kind in (b"L", b"S", b"g"):
            raise NotPlainTarError
        offset += -(-size // _BLOCK) * _BLOCK
    raise tarfile.ReadError("no end-of-archive mark: cut off")


class SampleIndex(NamedTuple):
    """Usable samples of a shard: their keys, and [n, 4] (image offset, image size, caption offset, caption size)."""

    keys: list[str]
    spans_n4: np.ndarray


def index_samples(path: Path, skip: Container[str], truncated: bool = False) -> SampleIndex:
    """Samples with an image and a caption whose key is not to be skipped, in order.

    Of a shard known to be truncated, those before the damage; otherwise damage raises as in `read_members`.
    """
    keys: list[str] = []
    spans: list[list[int]] = []
    current, image, caption = "", None, None
    for member in [*read_members(path, up_to_damage=truncated), Member("", 0, 0)]:
        key, kind = split_name(member.name)
        if key != current:
            if image and caption and current not in skip:
                keys.append(current)
                spans.append([*image[1:], *caption[1:]])
            current, image, caption = key, None, None
        if kind in IMAGE_TYPES:
            image = member
        elif kind == CAPTION_TYPE:
            caption = member
    return SampleIndex(keys, np.array(spans, dtype=np.int64).reshape(-1, 4))
