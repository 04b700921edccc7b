"""What a set should hold, from its dataset.json and from what is known of the common sets, against what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from formats.errors import UserError
from pipeline.evaluation.known_sets import KNOWN_SETS, KnownSet, set_key
from pipeline.evaluation.set_files import read_json_object

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
            declared = _Declared.model_validate(read_json_object(file) if file.is_file() else {})
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
