"""The files of which evaluation sets are made; of tars the headers are read once, image bytes only when asked for.

Nothing is extracted or unpickled, and whatever is not understood is an error: a figure is for the whole set.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from formats import files
from formats.errors import UserError
from formats.tar import IMAGE_TYPES, MAX_MEMBER_BYTES, Member, read_tar, split_name
from formats.texts import TextError, decode_text, is_blank

# Captions, a class, a 0 or 1 for each class; and what beside them says nothing of the sample that is evaluated.
_READ_TYPES = frozenset({"txt", "cls", "npy"})
_UNUSED_TYPES = frozenset({"json"})
_NUMBER = re.compile(r"[0-9]{1,9}")

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
        if self.size_bytes > MAX_MEMBER_BYTES:
            raise UserError(f"{self}: {self.size_bytes} bytes is over the limit of {MAX_MEMBER_BYTES} for one image")
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


@dataclass(frozen=True)
class Collection:
    """Distinct images or texts of a data set whose features a task needs; a row of features is an item's place."""

    name: str
    kind: Literal["images", "texts"]
    items: Sequence[ImageFile] | Sequence[str]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def sha256(self) -> str:
        """Names the list of items: texts themselves, of images their place in files."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item}\0".encode())
            if isinstance(item, ImageFile):
                digest.update(f"{item.path.name}\0{item.offset_bytes}\0{item.size_bytes}\0".encode())
        return digest.hexdigest()


@dataclass
class TarSample:
    """The members of one tar that share a key; `contents` by the types that are read at once."""

    key: str
    path: Path
    image: ImageFile | None = None
    contents: dict[str, bytes] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"sample {self.key!r} in {self.path}"

    def require_image(self) -> ImageFile:
        """The image; raises UserError if the sample has none."""
        if self.image is None:
            raise UserError(f"{self} has no image: expected one of {', '.join(sorted(IMAGE_TYPES))}")
        return self.image

    def text(self, kind: str) -> str:
        """A text of the sample, "" if it has none; raises UserError for what is not text."""
        try:
            return decode_text(self.contents.get(kind, b""))
        except TextError as error:
            raise UserError(f"{self}: its .{kind} member is {error}") from error

    def require_labels(self, num_classes: int) -> tuple[int, ...]:
        """The classes in the image, from a .npy of a 0 or 1 for each; raises UserError for anything else."""
        if "npy" not in self.contents:
            raise UserError(f"{self} has no labels: expected a .npy member with a 0 or 1 for each class")
        try:
            return read_labels(self.contents["npy"], num_classes)
        except ValueError as error:
            raise UserError(f"{self}: its .npy member {error}") from error


def split_samples(split: Path) -> list[TarSample]:
    """Samples of every shard that the split's nshards.txt promises, no more and no fewer; else UserError."""
    count_file = split / "nshards.txt"
    text = read_text(count_file, "the number of shards 0.tar, 1.tar, … beside it").strip()
    if not _NUMBER.fullmatch(text) or int(text) == 0:
        raise UserError(f"{count_file} must hold a positive integer, the number of shards; it holds {text[:80]!r}")
    found = len(list(split.glob("[!.]*.tar")))
    if found > int(text):
        raise UserError(f"{split} holds {found} tars, but nshards.txt says {text}: some would not be evaluated")
    samples = [sample for shard in range(int(text)) for sample in read_tar_samples(split / f"{shard}.tar")]
    if not samples:
        raise UserError(f"the shards in {split} hold no samples")
    return samples


def read_tar_samples(path: Path) -> list[TarSample]:
    """All samples of one uncompressed tar, in the order in which their keys first appear.

    Raises UserError for a missing, damaged, compressed or cut-off tar, for two members of one type with one key, and
    for a member that is not understood: left out, it could be a sample, and the figure not of the whole set.
    """
    try:
        content = read_tar(path)
    except FileNotFoundError as error:
        raise UserError(f"missing shard {path}: nshards.txt promises it") from error
    if content.damage is not None:
        raise UserError(f"cannot read {path}: {content.damage}; it must be an uncompressed, complete tar")
    if content.others:
        raise UserError(f"{path} holds {content.others} links or the like: pack it anew, with the files themselves")
    samples: dict[str, TarSample] = {}
    with path.open("rb") as tar:
        for member in content.members:
            key, kind = split_name(member.name)
            if key:  # the rest are notes of a file system, such as ._name
                _add(samples.setdefault(key, TarSample(key, path)), member, kind, tar)
    return list(samples.values())


def _add(sample: TarSample, member: Member, kind: str, tar: BinaryIO) -> None:
    if kind in IMAGE_TYPES:
        if sample.image is not None:
            raise UserError(f"{sample} has two images: {sample.image.name} and {member.name}")
        sample.image = ImageFile(sample.path, *member)
    elif kind in _READ_TYPES:
        if kind in sample.contents:
            raise UserError(f"{sample} has two .{kind} members: keys must be unique within a shard")
        if member.size_bytes > _MAX_TEXT_BYTES:
            raise UserError(f"{member.name} in {sample.path}: {member.size_bytes} bytes is too long for a .{kind}")
        tar.seek(member.offset_bytes)
        sample.contents[kind] = tar.read(member.size_bytes)
    elif kind not in _UNUSED_TYPES:
        known = ", ".join(sorted(IMAGE_TYPES | _READ_TYPES | _UNUSED_TYPES))
        raise UserError(
            f"{member.name} in {sample.path}: members of type .{kind} are not understood, only {known}; the type "
            "begins at a name's first dot: rename such members, or leave them out"
        )


def read_labels(npy: bytes, num_classes: int) -> tuple[int, ...]:
    """Which of the numbers in an array file are 1. The header is checked before anything is made of the rest.

    Raises ValueError, after "its .npy member", unless it is `num_classes` numbers that are 0 or 1.
    """
    stream = io.BytesIO(npy)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("is not of format 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1000)
    data = stream.read()
    if shape != (num_classes,) or dtype.kind not in "biuf" or len(data) != num_classes * dtype.itemsize:
        raise ValueError(
            f"holds {shape} values of {dtype}, expected {num_classes} numbers, as many as there are classes"
        )
    present = np.frombuffer(data, dtype)
    if not np.isin(present, (0, 1)).all():
        raise ValueError("holds other values than 0 and 1")
    return tuple(np.flatnonzero(present).tolist())


def read_lines(file: Path) -> tuple[str, ...]:
    """The lines of a list, none of them blank, at least one; else UserError."""
    lines = [line.strip() for line in read_text(file, "one entry per line").rstrip().splitlines()]
    if not lines:
        raise UserError(f"{file} is empty: expected one entry per line")
    for number, line in enumerate(lines, 1):
        if is_blank(line):
            raise UserError(f"{file}, line {number} is blank: fill or remove it (a class is the number of its line)")
    return tuple(lines)


def read_text(file: Path, expectation: str) -> str:
    """A file of UTF-8; UserError if it is missing, saying what was expected of it, or is something else."""
    try:
        return files.read_text(file)
    except FileNotFoundError as error:
        raise UserError(f"missing {file}: expected {expectation}") from error
