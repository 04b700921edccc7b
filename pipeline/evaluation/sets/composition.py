"""Composition sets: images/ and JSON files beside it, as SugarCrepe has them or with groups as in Winoground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import read_json
from formats.texts import clean, is_blank
from pipeline.evaluation.sets.files import Collection, ImageFile
from pipeline.evaluation.sets.known import DATASET_FILE

_SUGAR_CREPE = ("filename", "caption", "negative_caption")
_GROUP = ("image_0", "image_1", "caption_0", "caption_1")


@dataclass(frozen=True)
class CompositionSample:
    """One image, its caption and a hard negative: the same words rearranged, or one of them replaced."""

    image: ImageFile
    category: str
    caption: str
    negative_caption: str


@dataclass(frozen=True)
class CompositionSet:
    """Hard negatives of several categories (`swap_att`, `replace_obj`, ...)."""

    name: str
    samples: tuple[CompositionSample, ...]
    expected_samples: int | None = None

    @property
    def images(self) -> list[ImageFile]:
        """That of each sample; several may be about one image."""
        return [sample.image for sample in self.samples]

    @property
    def captions(self) -> list[str]:
        """All captions, then all negatives."""
        negatives = [sample.negative_caption for sample in self.samples]
        return [sample.caption for sample in self.samples] + negatives

    def collections(self) -> dict[str, Collection]:
        """What is encoded of it."""
        return _distinct(self.name, self.images, self.captions)


@dataclass(frozen=True)
class GroupSample:
    """Two images and two captions that are to be told apart: caption i belongs to image i."""

    images: tuple[ImageFile, ImageFile]
    captions: tuple[str, str]


@dataclass(frozen=True)
class GroupSet:
    """Groups as in Winoground."""

    name: str
    samples: tuple[GroupSample, ...]
    expected_samples: int | None = None

    @property
    def images(self) -> list[ImageFile]:
        """Both of each group."""
        return [image for sample in self.samples for image in sample.images]

    @property
    def captions(self) -> list[str]:
        """Both of each group."""
        return [caption for sample in self.samples for caption in sample.captions]

    def collections(self) -> dict[str, Collection]:
        """What is encoded of it."""
        return _distinct(self.name, self.images, self.captions)


def _distinct(name: str, images: Sequence[ImageFile], captions: Sequence[str]) -> dict[str, Collection]:
    return {
        "images": Collection(name, "images", list(dict.fromkeys(images))),
        "captions": Collection(name, "texts", list(dict.fromkeys(captions))),
    }


def read_composition_set(directory: Path) -> CompositionSet | GroupSet:
    """The set in a directory with images/: of groups if its first entry is one.

    Raises UserError that names the file and the entry for everything that does not fit.
    """
    files = sorted(path for path in directory.glob("[!.]*.json") if path.name != DATASET_FILE)
    if not files:
        raise UserError(f"no categories in {directory}: expected files such as swap_att.json beside images/")
    entries = [(file, index, entry) for file in files for index, entry in _entries(file)]
    name = directory.resolve().name
    if "image_0" in entries[0][2]:
        return GroupSet(name, tuple(_group(directory / "images", *entry) for entry in entries))
    return CompositionSet(name, tuple(_sample(directory / "images", *entry) for entry in entries))


def _entries(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    entries = read_json(file)
    if not entries:
        raise UserError(f"{file} is empty: expected entries with filename, caption, negative_caption")
    return [(index, entry if isinstance(entry, dict) else {}) for index, entry in entries.items()]


def _sample(images: Path, file: Path, index: str, entry: Mapping[str, Any]) -> CompositionSample:
    filename, caption, negative = _strings(file, index, entry, _SUGAR_CREPE)
    return CompositionSample(_image(images, file, index, filename), file.stem, caption, negative)


def _group(images: Path, file: Path, index: str, entry: Mapping[str, Any]) -> GroupSample:
    *filenames, caption_0, caption_1 = _strings(file, index, entry, _GROUP)
    first, second = (_image(images, file, index, filename) for filename in filenames)
    return GroupSample((first, second), (caption_0, caption_1))


def _strings(file: Path, index: str, entry: Mapping[str, Any], fields: tuple[str, ...]) -> list[str]:
    texts = [entry.get(name) for name in fields]
    if not all(isinstance(text, str) and not is_blank(text) and clean(text) == text for text in texts):
        raise UserError(f"{file}, entry {index}: expected strings {', '.join(fields[:-1])} and {fields[-1]}")
    return [str(text) for text in texts]


def _image(images: Path, file: Path, index: str, filename: str) -> ImageFile:
    if Path(filename).name != filename:
        raise UserError(f"{file}, entry {index}: filename {filename!r} must lie directly in images/")
    path = images / filename
    if not path.is_file():
        raise UserError(f"{file}, entry {index}: missing image {path}")
    return ImageFile.whole(path)
