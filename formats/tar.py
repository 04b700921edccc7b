"""Tars of samples: one walk over the headers, and one rule of which member belongs to which sample.

Nothing is extracted, unpickled or trusted, and only the member types below are ever read. A member belongs to the
sample whose key its name begins with, by webdataset's rule; one without a key (`._name`, a folder, a comment) is left
out and ends nothing.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import tarfile
from collections.abc import Collection, Container, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

IMAGE_TYPES = frozenset({"jpg", "jpeg", "png", "webp"})
CAPTION_TYPE = "txt"
SAMPLE_TYPES = IMAGE_TYPES | {CAPTION_TYPE, "json"}
MAX_MEMBER_BYTES = 64 << 20
MAX_HEADER_BYTES = 256 << 10  # of one member, with its extended headers

_BLOCK = 512
_PLAIN_FILES = (b"0", b"\0")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_NOT_ZERO = re.compile(rb"[^\0]")
_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class Member(NamedTuple):
    """A plain file in a tar: its name and the stretch of bytes that is its content."""

    name: str
    offset_bytes: int
    size_bytes: int


@dataclasses.dataclass
class TarContent:
    """What the headers of a tar say.

    members: plain files, in order; of a damaged tar those before the damage
    others: how many links, devices, sparse files and the like there are; folders do not count
    damage: what ended the reading before the end of the archive, or follows that end; None for a sound tar
    """

    members: list[Member] = dataclasses.field(default_factory=list)
    others: int = 0
    damage: str | None = None


@dataclasses.dataclass
class Sample:
    """The members of one key that follow each other in the tar.

    `complaints` names what is wrong with the members themselves: `duplicate_member` (two of a type, or two
    images), `member_too_large`, `unsafe_name` (absolute, or climbing out of the archive).
    """

    key: str
    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    complaints: set[str] = dataclasses.field(default_factory=set)


class SampleIndex(NamedTuple):
    """Usable samples of a shard: their keys, and [n, 4] (image offset, image size, caption offset, caption size)."""

    keys: list[str]
    spans_n4: np.ndarray


def split_name(name: str) -> tuple[str, str]:
    """(key, type) by webdataset's rule: the key ends at the first dot of the last path component; types in lower case.

    A name without a dot, or with nothing before it, has no key: ("", "").
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, kind = base.partition(".")
    return (f"{folder}{slash}{stem}", kind.lower()) if stem and dot else ("", "")


def read_tar(path: Path) -> TarContent:
    """Go over the headers of a tar. Damage raises nothing; OSError for a file that cannot be read."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return TarContent(damage="an empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if (damage := _other_format(data)) is not None:
                return TarContent(damage=damage)
            content = TarContent()
            try:
                end = _walk(data, content)
            except _NotPlainTarError:
                content = TarContent()
                end = _walk_by_tarfile(file, content)
            if content.damage is None:
                content.damage = _what_follows(data, end)
            return content


def read_members(path: Path) -> list[Member]:
    """Plain files of an uncompressed tar in order. Raises tarfile.ReadError if it is damaged or no tar, or OSError."""
    content = read_tar(path)
    if content.damage is not None:
        raise tarfile.ReadError(content.damage)
    return content.members


class TarSamples:
    """Iterate over the samples of a tar: once, in order, one sample in memory at a time.

    After the iteration, `unknown_members` counts what was left out (types outside `SAMPLE_TYPES`, names without a
    key, links, devices, sparse files), and `damage` says what ended the tar early, if anything did. Members whose type
    is not in `types` are not read. A damaged tar raises nothing: what comes before the damage is given.
    """

    def __init__(self, path: Path, types: Collection[str] = SAMPLE_TYPES) -> None:
        self.unknown_members = 0
        self.damage: str | None = None
        self._path = path
        self._types = types

    def __iter__(self) -> Iterator[Sample]:
        content = read_tar(self._path)
        self.damage = content.damage
        named = sum(split_name(member.name)[1] in SAMPLE_TYPES for member in content.members)
        self.unknown_members = content.others + len(content.members) - named
        with self._path.open("rb") as stream:
            for key, members, complaints in _group(content.members):
                sample = Sample(key, complaints=complaints)
                for kind, member in members.items():
                    if kind not in self._types:
                        continue
                    if member.size_bytes > MAX_MEMBER_BYTES:
                        complaints.add("member_too_large")
                        continue
                    stream.seek(member.offset_bytes)
                    sample.members[kind] = stream.read(member.size_bytes)
                if sample.members or complaints:
                    yield sample


def index_samples(path: Path, skip: Container[str], truncated: bool = False) -> SampleIndex:
    """Samples with an image and a caption whose key is not to be skipped, in order.

    Of a shard known to be `truncated`, those before the damage; otherwise damage raises as in `read_members`.
    """
    keys: list[str] = []
    spans: list[list[int]] = []
    members = read_tar(path).members if truncated else read_members(path)
    for key, of_sample, complaints in _group(members):
        image = next((member for kind, member in of_sample.items() if kind in IMAGE_TYPES), None)
        caption = of_sample.get(CAPTION_TYPE)
        if image and caption and not complaints and key not in skip:
            keys.append(key)
            spans.append([*image[1:], *caption[1:]])
    return SampleIndex(keys, np.array(spans, dtype=np.int64).reshape(-1, 4))


def _group(members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member], set[str]]]:
    """(key, members of known types, complaints) of each run of members with one key."""
    current, of_sample, complaints = "", dict[str, Member](), set[str]()
    for member in members:
        key, kind = split_name(member.name)
        if not key:
            continue
        if key != current:
            if of_sample:
                yield current, of_sample, complaints
            current, of_sample, complaints = key, {}, set()
        # a member of an unknown type is left out, yet it ends the sample before it, as in webdataset
        if kind in SAMPLE_TYPES:
            if key.startswith("/") or ".." in key.split("/"):
                complaints.add("unsafe_name")
            if kind in of_sample or (kind in IMAGE_TYPES and of_sample.keys() & IMAGE_TYPES):
                complaints.add("duplicate_member")
            of_sample[kind] = member
    if of_sample:
        yield current, of_sample, complaints


class _NotPlainTarError(Exception):
    """The fast walk met a header that it leaves to the standard library's reader."""


def _walk(data: mmap.mmap, content: TarContent) -> int:
    """Fill `content` from ustar headers, several times as fast as `tarfile`; returns where the archive ended."""
    offset, end = 0, len(data)
    while offset + _BLOCK <= end:
        header = data[offset : offset + _BLOCK]
        if header[0] == 0 and not any(header):
            return offset
        kind, size = header[156:157], _octal(header[124:136])
        # most of a header is zeros, which add nothing
        if _octal(header[148:156]) != 256 + sum(header.translate(None, b"\0")) - sum(header[148:156]):
            raise _NotPlainTarError
        offset += _BLOCK
        if kind in _PLAIN_FILES:
            if offset + size > end:
                content.damage = "cut off inside a member"
                return end
            content.members.append(Member(_name(header), offset, size))
        elif kind == b"x" and size <= MAX_HEADER_BYTES:
            records = data[offset : offset + size]
            if b" path=" in records or b" size=" in records or b"sparse" in records:
                raise _NotPlainTarError
        elif kind in _WITHOUT_CONTENT:
            content.others += kind != b"5"
            continue
        else:
            raise _NotPlainTarError
        offset += -(-size // _BLOCK) * _BLOCK
    content.damage = "cut off: it has no end-of-archive mark"
    return end


def _octal(field: bytes) -> int:
    text = field.split(b"\0", 1)[0].strip()
    if text and not text.isdigit():
        raise _NotPlainTarError
    try:
        return int(text or b"0", 8)
    except ValueError as error:
        raise _NotPlainTarError from error


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return _decode(prefix + b"/" + name if prefix else name)


def _decode(name: bytes) -> str:
    """Names that are not UTF-8 stay different from each other, and can be written anywhere: caf\\xe9.jpg."""
    return name.decode("utf-8", "backslashreplace")


def _walk_by_tarfile(file: BinaryIO, content: TarContent) -> int:
    end = file.seek(0, os.SEEK_END)
    stream = _HeaderStream(file)
    try:
        tar = tarfile.TarFile(fileobj=cast(BinaryIO, stream), encoding="utf-8", errors="surrogateescape")
        for header in _headers(tar, stream):
            if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.issparse():
                content.others += 1
                continue
            if header.offset_data + header.size > end:
                raise tarfile.ReadError("cut off inside a member")
            name = _decode(header.name.encode("utf-8", "surrogateescape"))
            content.members.append(Member(name, header.offset_data, header.size))
        # tarfile takes a damaged header for the end, so look for the zero block oneself
        file.seek(tar.offset)
        block = file.read(_BLOCK)
        if block != bytes(_BLOCK):
            is_cut = len(block) < _BLOCK
            content.damage = "cut off: it has no end-of-archive mark" if is_cut else f"a damaged header at {tar.offset}"
        return tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        content.damage = str(error) or "a damaged header"
    return end


def _headers(tar: tarfile.TarFile, stream: _HeaderStream) -> Iterator[tarfile.TarInfo]:
    """Those of everything but folders."""
    previous_offset = -1
    while (header := tar.next()) is not None:
        stream.allowance_bytes = MAX_HEADER_BYTES
        # a crafted header can send the reader backwards, for ever
        if header.offset <= previous_offset or header.size < 0:
            raise tarfile.ReadError("member offsets do not increase")
        previous_offset = header.offset
        tar.members.clear()  # type: ignore[attr-defined]  # or every header stays in memory
        if not header.isdir():
            yield header


class _HeaderStream:
    """What `tarfile` reads headers from: it gives no more than a header's due at once, and nothing past the end.

    Otherwise a crafted extended header could have the rest of the shard read into memory.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.allowance_bytes = MAX_HEADER_BYTES
        self._stream = stream
        self._size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(0)

    def read(self, size: int) -> bytes:
        self.allowance_bytes -= size
        if size < 0 or self.allowance_bytes < 0:
            raise tarfile.ReadError("header too long")
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        if not 0 <= position <= self._size_bytes:
            raise tarfile.ReadError("cut off inside a member")
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _other_format(data: mmap.mmap) -> str | None:
    """What a file is that is no tar at all."""
    start = data[:_BLOCK]
    for magic, name in _OTHER_FORMATS.items():
        if start.startswith(magic):
            return f"{name}, not a tar: decompress it" if name != "zip" else "a zip file, not a tar"
    if start.strip(b"\0") and not _has_checksum(start):
        return f"not a tar: it begins with {start[:16]!r}"
    return None


def _what_follows(data: mmap.mmap, end: int) -> str | None:
    """Another archive behind the end of this one would be lost without a word; anything else there is padding."""
    found = _NOT_ZERO.search(data, end)
    if found is None:
        return None
    start = found.start() // _BLOCK * _BLOCK
    is_tar = _has_checksum(data[start : start + _BLOCK])
    return "several tars joined in one file, of which only the first can be read" if is_tar else None


def _has_checksum(header: bytes) -> bool:
    """Whether a block may be a header, its checksum of signed or unsigned bytes."""
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
