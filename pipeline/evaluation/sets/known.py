"""What is known of the common sets, by name: how large they are, their classes; and what a set says of itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from formats.errors import UserError
from formats.files import read_json


@dataclass(frozen=True)
class KnownSet:
    """What the test split of a set holds; `captions_per_image`: at least so many for each."""

    samples: int | None
    classes: int | None = None
    captions_per_image: int | None = None


# Keys as `set_key` makes them of CLIP_benchmark's names.
KNOWN_SETS = {
    "imagenet1k": KnownSet(50_000, classes=1000),
    "imagenetv2": KnownSet(10_000, classes=1000),
    "imageneta": KnownSet(7_500, classes=200),
    "imagenetr": KnownSet(30_000, classes=200),
    "imageneto": KnownSet(2_000, classes=200),
    "imagenetsketch": KnownSet(50_889, classes=1000),
    "objectnet": KnownSet(18_574, classes=113),
    "letitwag": KnownSet(130_500, classes=290),  # 450 of each class
    "cifar10": KnownSet(10_000, classes=10),
    "cifar100": KnownSet(10_000, classes=100),
    "mnist": KnownSet(10_000, classes=10),
    "svhn": KnownSet(26_032, classes=10),
    "stl10": KnownSet(8_000, classes=10),
    "food101": KnownSet(25_250, classes=101),
    "sun397": KnownSet(None, classes=397),
    "cars": KnownSet(8_041, classes=196),
    "fgvcaircraft": KnownSet(3_333, classes=100),
    "voc2007": KnownSet(14_976, classes=20),
    "voc2007multilabel": KnownSet(4_952, classes=20),
    "dtd": KnownSet(1_880, classes=47),
    "pets": KnownSet(3_669, classes=37),
    "flowers": KnownSet(6_149, classes=102),
    "eurosat": KnownSet(5_400, classes=10),
    "resisc45": KnownSet(6_300, classes=45),
    "gtsrb": KnownSet(12_630, classes=43),
    "country211": KnownSet(21_100, classes=211),
    "pcam": KnownSet(32_768, classes=2),
    "fer2013": KnownSet(7_178, classes=7),
    "renderedsst2": KnownSet(1_821, classes=2),
    "flickr8k": KnownSet(1_000, captions_per_image=5),
    "flickr30k": KnownSet(1_000, captions_per_image=5),
    "mscococaptions": KnownSet(5_000, captions_per_image=5),
}


def set_key(name: str) -> str:
    """A set by any of its names: `wds_vtab-cifar10`, `vtab/cifar10` and `CIFAR-10` are `cifar10`."""
    plain = re.sub(r"^(wds[_-])?(vtab[/_-])?", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)


class ClassNames(BaseModel):
    """Of one set. `order` says whence the order of the classes, which is that of the labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: str
    templates: tuple[str, ...]
    classes: tuple[str, ...]


def class_names_of(name: str) -> ClassNames | None:
    """Of a set by any of its names, as a directory or CLIP_benchmark calls it; None if it is not in the list."""
    return all_class_names().get(set_key(name))


@cache
def all_class_names() -> dict[str, ClassNames]:
    """All sets of the list by their keys."""
    content = yaml.safe_load(files("pipeline.evaluation.sets").joinpath("class_names.yaml").read_text(encoding="utf-8"))
    return {key: ClassNames.model_validate(fields) for key, fields in content.items()}


DATASET_FILE = "dataset.json"


class _Declared(BaseModel):
    """dataset.json; `known_set` says which common set it is, whatever the directory's name, or that it is none."""

    model_config = ConfigDict(strict=True)

    samples: PositiveInt | None = None
    captions_per_image: PositiveInt | None = None
    allow_empty_classes: bool = False
    known_set: str | Literal[False] | None = None


@dataclass(frozen=True)
class Expectations:
    """What is expected of the set in a directory: by its dataset.json (`declared`) and as a set that is known."""

    directory: Path
    declared: _Declared
    known: KnownSet | None

    @staticmethod
    def of(directory: Path) -> Expectations:
        """Of a set; raises UserError if its dataset.json does not say what it may say."""
        file = directory / DATASET_FILE
        try:
            declared = _Declared.model_validate(read_json(file) if file.exists() else {})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if declared.known_set is False:
            return Expectations(directory, declared, None)
        known = KNOWN_SETS.get(set_key(declared.known_set or directory.resolve().name))
        if known is None and declared.known_set is not None:
            raise UserError(f"{file}: known_set is {declared.known_set!r}, expected one of {', '.join(KNOWN_SETS)}")
        return Expectations(directory, declared, known)

    def check_samples(self, samples: int) -> int | None:
        """The number of samples that is expected, if it is known. Raises UserError if there are others."""
        expected = self.declared.samples
        if expected is not None and expected != samples:
            raise UserError(
                f"{self.directory} holds {samples} samples, but its {DATASET_FILE} says {expected}: copy it again"
            )
        if self.known is not None and self.known.samples not in (None, samples):
            raise self._not_the_known_set(f"{samples:,} samples", f"{self.known.samples:,}")
        return expected or (self.known.samples if self.known else None)

    def check_classes(self, class_names: Sequence[str], labels: set[int], file: Path) -> None:
        """Raises UserError if the known set has another number of classes, or if one has no sample."""
        if self.known is not None and self.known.classes not in (None, len(class_names)):
            raise self._not_the_known_set(f"{len(class_names):,} classes", f"{self.known.classes:,}", file)
        empty = sorted(set(range(len(class_names))) - labels)
        if empty and not self.declared.allow_empty_classes:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UserError(
                f"{file} names class {empty[0]} ({class_names[empty[0]]}){more}, of which test/ has no sample: names "
                f'and labels disagree; if it is on purpose, write "allow_empty_classes": true into {DATASET_FILE}'
            )

    def check_captions(self, sample: object, captions: int) -> None:
        """Raises UserError if a sample has fewer captions than each should have."""
        declared = self.declared.captions_per_image
        if declared is not None and captions < declared:
            raise UserError(f"{sample} has {captions} captions, but {DATASET_FILE} says {declared} for each image")
        expected = self.known.captions_per_image if self.known else None
        if expected is not None and captions < expected:
            raise self._not_the_known_set(f"{captions} captions", f"{expected} for each image", sample)

    def _not_the_known_set(self, found: str, expected: str, where: object = None) -> UserError:
        name = self.declared.known_set or self.directory.resolve().name
        return UserError(
            f"{where or self.directory} has {found}, but {name} has {expected}: take the whole test split, or write "
            f'"known_set": false into {self.directory / DATASET_FILE} if it is another set'
        )
