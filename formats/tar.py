"""Reading samples from a tar of unknown origin: nothing is extracted, unpickled or trusted."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, cast

IMAGE_TYPES = frozenset({"jpg", "jpeg", "png", "webp"})
SAMPLE_TYPES = IMAGE_TYPES | {"txt", "json"}
MAX_MEMBER_BYTES = 64 << 20
MAX_HEADER_BYTES = 256 << 10  # of one member, with its extended headers


@dataclasses.dataclass
class Sample:
    """The members of one key that follow each other in the tar.

    `complaints` names what is wrong with the members themselves: `duplicate_member` (two of a type, or two
    images), `member_too_large`, `unsafe_name` (absolute, climbing out of the archive, or without a key).
    """

    key: str
    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    complaints: set[str] = dataclasses.field(default_factory=set)


class TarSamples:
    """Iterate over the samples of a tar: once, in order, one sample in memory at a time.

    After the iteration, `unknown_members` counts what was left out (types outside `SAMPLE_TYPES`, links,
    devices, sparse files), and `truncated` tells whether the tar ended before its end-of-archive mark. Members
    whose type is not in `types` are not read. A damaged tar raises nothing: what comes before the damage is
    given.
    """

    def __init__(self, path: Path, types: Collection[str] = SAMPLE_TYPES) -> None:
        self.unknown_members = 0
        self.truncated = False
        self._path = path
        self._types = types

    def __iter__(self) -> Iterator[Sample]:
        sample: Sample | None = None
        for key, member_type, content in self._members():
            if sample is None or sample.key != key:
                if sample is not None and (sample.members or sample.complaints):
                    yield sample
                sample = Sample(key)
            # an unknown member is left out, yet it ends the sample before it, as in webdataset
            if member_type in SAMPLE_TYPES:
                _add(sample, member_type, content)
        if sample is not None and (sample.members or sample.complaints):
            yield sample

    def _members(self) -> Iterator[tuple[str, str, bytes | None]]:
        """Give (key, type, content) of each plain file; the content is None if it was not to be read."""
        try:
            with self._path.open("rb") as stream:
                headers = _HeaderStream(stream)
                tar = tarfile.TarFile(fileobj=cast(BinaryIO, headers), encoding="utf-8", errors="surrogateescape")
                for header in _headers(tar, headers):
                    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.issparse():
                        self.unknown_members += 1
                        continue
                    key, member_type = split_name(header.name)
                    if member_type not in SAMPLE_TYPES:
                        self.unknown_members += 1
                    elif member_type not in self._types:
                        continue
                    yield key, member_type, _content(stream, header) if member_type in self._types else None
                # tarfile takes a damaged header for the end, so look for the zero block oneself
                stream.seek(tar.offset)
                self.truncated = stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError):
            self.truncated = True


def split_name(name: str) -> tuple[str, str]:
    """(key, type) by webdataset's rule: the key ends at the first dot of the last path component."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    folder, slash, base = text.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


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
            raise tarfile.ReadError("unexpected end of data")
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _headers(tar: tarfile.TarFile, stream: _HeaderStream) -> Iterator[tarfile.TarInfo]:
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


def _content(stream: BinaryIO, header: tarfile.TarInfo) -> bytes | None:
    if header.size > MAX_MEMBER_BYTES:
        return None
    stream.seek(header.offset_data)
    content = stream.read(header.size)
    if len(content) != header.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _add(sample: Sample, member_type: str, content: bytes | None) -> None:
    if not sample.key or sample.key.endswith("/") or sample.key.startswith("/") or ".." in sample.key.split("/"):
        sample.complaints.add("unsafe_name")
    if member_type in sample.members or (member_type in IMAGE_TYPES and sample.members.keys() & IMAGE_TYPES):
        sample.complaints.add("duplicate_member")
    if content is None:
        sample.complaints.add("member_too_large")
    else:
        sample.members[member_type] = content
