"""Samples of webdataset tars by random access: the headers are read once, image bytes only when asked for.

Nothing is extracted or unpickled, and only the closed list of member types is ever read.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pipeline.data.tar_index import IMAGE_TYPES, Member, read_members, split_name
from pipeline.errors import UserError

TEXT_TYPES = frozenset({"txt", "cls"})

_MAX_IMAGE_BYTES = 64 * 2**20
_MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True)
class ImageFile:
    """The encoded bytes of one image: a whole file, or a stretch of an uncompressed tar."""

    path: Path
    name: str
    offset_bytes: int
    size_bytes: int

    @staticmethod
    def whole(path: Path) -> ImageFile:
        """An image that is a file of its own; raises OSError if there is none."""
        return ImageFile(path, path.name, 0, path.stat().st_size)

    def read(self) -> bytes:
        """The encoded image. Raises UserError if it is over the size limit or can no longer be read in full."""
        if self.size_bytes > _MAX_IMAGE_BYTES:
            raise UserError(f"{self}: {self.size_bytes} bytes is over the limit of {_MAX_IMAGE_BYTES} for one image")
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset_bytes)
                data = file.read(self.size_bytes)
        except OSError as error:
            raise UserError(f"cannot read {self}: {error.strerror}") from error
        if len(data) != self.size_bytes:
            raise UserError(f"{self}: the file became shorter while it was being evaluated")
        return data

    def __str__(self) -> str:
        return str(self.path) if self.name == self.path.name else f"{self.name} in {self.path}"


@dataclass
class TarSample:
    """The members of one tar that share a key."""

    key: str
    path: Path
    image: ImageFile | None = None
    texts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"sample {self.key!r} in {self.path}"

    def require_image(self) -> ImageFile:
        """The image; raises UserError if the sample has none."""
        if self.image is None:
            raise UserError(f"{self} has no image: expected one of {', '.join(sorted(IMAGE_TYPES))}")
        return self.image


def read_tar_samples(path: Path) -> list[TarSample]:
    """All samples of one uncompressed tar, in the order in which their keys first appear.

    Raises UserError for a missing, damaged, compressed or cut-off tar, for a key with two members of one type, and
    for text that is not UTF-8.
    """
    samples: dict[str, TarSample] = {}
    try:
        members = read_members(path)
        with path.open("rb") as tar:
            for member in members:
                key, kind = split_name(member.name)
                if kind in IMAGE_TYPES:
                    _add_image(samples.setdefault(key, TarSample(key, path)), member)
                elif kind in TEXT_TYPES:
                    _add_text(samples.setdefault(key, TarSample(key, path)), member, kind, tar)
    except FileNotFoundError as error:
        raise UserError(f"missing shard {path}: nshards.txt promises it") from error
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; it must be an uncompressed, complete tar") from error
    return list(samples.values())


def _add_image(sample: TarSample, member: Member) -> None:
    if sample.image is not None:
        raise UserError(f"{sample} has two images: {sample.image.name} and {member.name}")
    sample.image = ImageFile(sample.path, *member)


def _add_text(sample: TarSample, member: Member, kind: str, tar: BinaryIO) -> None:
    if kind in sample.texts:
        raise UserError(f"{sample} has two .{kind} members: keys must be unique within a shard")
    if member.size_bytes > _MAX_TEXT_BYTES:
        raise UserError(f"{member.name} in {sample.path}: {member.size_bytes} bytes is too long for a .{kind}")
    tar.seek(member.offset_bytes)
    try:
        sample.texts[kind] = tar.read(member.size_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{member.name} in {sample.path} is not UTF-8 text") from error
