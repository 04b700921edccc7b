"""Samples of webdataset tars by random access: the headers are read once, image bytes only when asked for.

Nothing is extracted or unpickled, and only the closed list of member types is ever read.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from formats.errors import UserError
from formats.tar import IMAGE_TYPES, Member, read_members, split_name

TEXT_TYPES = frozenset({"txt", "cls"})
LABELS_TYPE = "npy"

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
    """The members of one tar that share a key."""

    key: str
    path: Path
    image: ImageFile | None = None
    texts: dict[str, str] = field(default_factory=dict)
    labels_npy: bytes | None = None

    def __str__(self) -> str:
        return f"sample {self.key!r} in {self.path}"

    def require_image(self) -> ImageFile:
        """The image; raises UserError if the sample has none."""
        if self.image is None:
            raise UserError(f"{self} has no image: expected one of {', '.join(sorted(IMAGE_TYPES))}")
        return self.image

    def require_labels(self, num_classes: int) -> tuple[int, ...]:
        """The classes in the image, from a .npy of a 0 or 1 for each; raises UserError for anything else."""
        if self.labels_npy is None:
            raise UserError(f"{self} has no labels: expected a .npy member with a 0 or 1 for each class")
        try:
            return read_labels(self.labels_npy, num_classes)
        except ValueError as error:
            raise UserError(f"{self}: its .npy member {error}") from error


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
                elif kind == LABELS_TYPE:
                    _add_labels(samples.setdefault(key, TarSample(key, path)), member, tar)
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


def _add_labels(sample: TarSample, member: Member, tar: BinaryIO) -> None:
    if sample.labels_npy is not None:
        raise UserError(f"{sample} has two .npy members: keys must be unique within a shard")
    if member.size_bytes > _MAX_TEXT_BYTES:
        raise UserError(f"{member.name} in {sample.path}: {member.size_bytes} bytes is too long for labels")
    tar.seek(member.offset_bytes)
    sample.labels_npy = tar.read(member.size_bytes)


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


def split_samples(split: Path) -> list[TarSample]:
    """Samples of every shard that the split's nshards.txt promises, no more and no fewer; else UserError."""
    count_file = split / "nshards.txt"
    text = read_text(count_file, "the number of shards 0.tar, 1.tar, … beside it").strip()
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise UserError(f"{count_file} must hold a positive integer, the number of shards; it holds {text!r}")
    found = len(list(split.glob("*.tar")))
    if found > int(text):
        raise UserError(f"{split} holds {found} tars, but nshards.txt says {text}: some would not be evaluated")
    samples = [sample for shard in range(int(text)) for sample in read_tar_samples(split / f"{shard}.tar")]
    if not samples:
        raise UserError(f"the shards in {split} hold no samples")
    return samples


def read_lines(file: Path) -> tuple[str, ...]:
    """The lines of a list, none of them blank, at least one; else UserError."""
    lines = [line.strip() for line in read_text(file, "one entry per line").rstrip().splitlines()]
    if not lines:
        raise UserError(f"{file} is empty: expected one entry per line")
    if "" in lines:
        number = lines.index("") + 1
        raise UserError(f"{file}, line {number} is blank: fill or remove it (a class is the number of its line)")
    return tuple(lines)


def read_text(file: Path, expectation: str) -> str:
    """A file of UTF-8; UserError if it is missing, saying what was expected of it, or is something else."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"missing {file}: expected {expectation}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object; UserError for anything else."""
    try:
        content = json.loads(read_text(file, "a JSON object"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content
