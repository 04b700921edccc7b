"""The evaluation layouts, checked and typed: docs/evaluation.md says what they hold.

Classification and retrieval are CLIP_benchmark's webdatasets; composition is JSON files (composition.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.texts import is_blank
from formats.word_counts import WordFrequencies
from pipeline.evaluation.sets.composition import CompositionSet, GroupSet, read_composition_set
from pipeline.evaluation.sets.files import Collection, ImageFile, TarSample, read_lines, read_text, split_samples
from pipeline.evaluation.sets.known import Expectations, class_names_of

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_TYPES = ("classification", "multilabel", "retrieval")


@dataclass(frozen=True)
class ClassificationSample:
    """One image and the index of its class."""

    image: ImageFile
    label: int


@dataclass(frozen=True)
class MultiLabelSample:
    """One image and the indices of the classes in it."""

    image: ImageFile
    labels: tuple[int, ...]


@dataclass(frozen=True)
class _NamedClasses:
    """Classes that have names; `{c}` in a template stands for the name."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    samples: tuple[Any, ...]
    expected_samples: int | None = None

    @property
    def prompts(self) -> list[str]:
        """Of every class one for each template."""
        return [template.replace("{c}", name) for name in self.class_names for template in self.templates]

    def collections(self) -> dict[str, Collection]:
        """What is encoded of it."""
        images = [sample.image for sample in self.samples]
        return {
            "images": Collection(self.name, "images", images),
            "prompts": Collection(self.name, "texts", list(dict.fromkeys(self.prompts))),
        }


@dataclass(frozen=True)
class MultiLabelSet(_NamedClasses):
    """Images of any number of known classes each."""

    samples: tuple[MultiLabelSample, ...]


@dataclass(frozen=True)
class ClassificationSet(_NamedClasses):
    """Images of one known class each.

    words: of the training captions, if accuracy is to be told apart by the frequency of a class's name
    """

    samples: tuple[ClassificationSample, ...]
    directory: Path | None = None
    words: WordFrequencies | None = None

    def has_split(self, split: str) -> bool:
        """Whether there is another split, `train` or `val`, beside the one for tests."""
        return self.directory is not None and (self.directory / split / "nshards.txt").exists()

    @cached_property
    def train(self) -> tuple[ClassificationSample, ...]:
        """The samples of the split to train probes on. Raises UserError as `open_evaluation_set` does."""
        return self._read_split("train")

    @cached_property
    def val(self) -> tuple[ClassificationSample, ...]:
        """The samples of the split to choose by."""
        return self._read_split("val")

    def _read_split(self, split: str) -> tuple[ClassificationSample, ...]:
        assert self.directory is not None
        return _labelled_samples(self.directory, split, len(self.class_names))


@dataclass(frozen=True)
class RetrievalSample:
    """One image and its captions, at least one."""

    image: ImageFile
    captions: tuple[str, ...]


@dataclass(frozen=True)
class RetrievalSet:
    """Images to be found by their captions, and captions by their images."""

    name: str
    samples: tuple[RetrievalSample, ...]
    expected_samples: int | None = None

    @property
    def captions(self) -> list[str]:
        """Those of all images, in their order."""
        return [caption for sample in self.samples for caption in sample.captions]

    def collections(self) -> dict[str, Collection]:
        """What is encoded of it."""
        return {
            "images": Collection(self.name, "images", [sample.image for sample in self.samples]),
            "captions": Collection(self.name, "texts", list(dict.fromkeys(self.captions))),
        }


EvaluationSet = ClassificationSet | MultiLabelSet | RetrievalSet | CompositionSet | GroupSet


def check_names(directories: Iterable[Path]) -> None:
    """Raise UserError if two sets have one name, which is that of the directory: their figures would mix."""
    seen: dict[str, Path] = {}
    for directory in directories:
        name = directory.resolve().name
        if name in seen:
            raise UserError(
                f"two evaluation sets are called {name}: {seen[name]} and {directory}; figures stand under the names "
                "of sets: leave one out, or rename its directory"
            )
        seen[name] = directory


def open_evaluation_sets(directories: Sequence[Path]) -> dict[Path, EvaluationSet]:
    """The evaluation sets in directories. Raises UserError for two of one name, and as `open_evaluation_set` does."""
    check_names(directories)
    return {directory: open_evaluation_set(directory) for directory in directories}


def open_evaluation_set(directory: Path) -> EvaluationSet:
    """Read the evaluation set in a directory, whichever of the layouts it has.

    Raises UserError, naming the file and what was expected of it, for everything that does not fit the layout.
    """
    if not directory.is_dir():
        raise UserError(f"no evaluation set at {directory}: there is no such directory")
    expectations = Expectations.of(directory)
    declared = _declared_type(directory)
    directory = directory.resolve()  # features are named by where images lie, however that was written
    if (directory / "images").is_dir():
        dataset: EvaluationSet = read_composition_set(directory)
    elif declared == "multilabel":
        dataset = _read_multi_label_set(directory, expectations)
    elif declared == "classification":
        dataset = _read_classification_set(directory, expectations)
    elif (directory / "test").is_dir():
        dataset = _read_retrieval_set(directory, expectations)
    else:
        raise UserError(
            f"no evaluation set in {directory}: expected test/ with {CLASSNAMES} (zero-shot), test/ alone (retrieval) "
            "or images/ with *.json (composition)"
        )
    return replace(dataset, expected_samples=expectations.check_samples(len(dataset.samples)))


def _declared_type(directory: Path) -> str | None:
    """CLIP_benchmark's type of a webdataset; by default classification if there are files for it."""
    file = directory / "dataset_type.txt"
    if file.exists():
        declared = read_text(file, "a type").strip().lower()
        if declared not in _TYPES:
            raise UserError(f"{file} holds {declared[:80]!r}: expected one of {', '.join(_TYPES)}")
        return declared
    is_classification = (
        (directory / CLASSNAMES).exists()
        or (directory / TEMPLATES).exists()
        or class_names_of(directory.resolve().name) is not None
    )
    return "classification" if is_classification else None


def _read_classification_set(directory: Path, expectations: Expectations) -> ClassificationSet:
    class_names, templates = _names_and_templates(directory)
    samples = _labelled_samples(directory, "test", len(class_names))
    expectations.check_classes(class_names, {sample.label for sample in samples}, directory / CLASSNAMES)
    return ClassificationSet(directory.resolve().name, class_names, templates, samples, directory=directory)


def _read_multi_label_set(directory: Path, expectations: Expectations) -> MultiLabelSet:
    class_names, templates = _names_and_templates(directory)
    samples = tuple(
        MultiLabelSample(sample.require_image(), sample.require_labels(len(class_names)))
        for sample in split_samples(directory / "test")
    )
    occurring = {label for sample in samples for label in sample.labels}
    expectations.check_classes(class_names, occurring, directory / CLASSNAMES)
    return MultiLabelSet(directory.resolve().name, class_names, templates, samples)


def _names_and_templates(directory: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those beside the data; a file that is missing is made up for if the set is a common one."""
    common = class_names_of(directory.resolve().name)
    if common is not None and not (directory / TEMPLATES).exists():
        templates = common.templates
    else:
        templates = read_lines(directory / TEMPLATES)
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{directory / TEMPLATES}: template {template!r} has no {{c}} for the class name")
    if common is not None and not (directory / CLASSNAMES).exists():
        return common.classes, templates
    return read_lines(directory / CLASSNAMES), templates


def _labelled_samples(directory: Path, split: str, num_classes: int) -> tuple[ClassificationSample, ...]:
    samples = split_samples(directory / split)
    return tuple(ClassificationSample(sample.require_image(), _label(sample, num_classes)) for sample in samples)


def _label(sample: TarSample, num_classes: int) -> int:
    text = sample.text("cls")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{sample} has no class index: expected a .cls member with an integer, found {text[:80]!r}")
    if int(text) >= num_classes:
        raise UserError(f"{sample} has class {text}, but {CLASSNAMES} names only classes 0 to {num_classes - 1}")
    return int(text)


def _read_retrieval_set(directory: Path, expectations: Expectations) -> RetrievalSet:
    samples = []
    for sample in split_samples(directory / "test"):
        samples.append(RetrievalSample(sample.require_image(), _captions(sample)))
        expectations.check_captions(sample, len(samples[-1].captions))
    return RetrievalSet(directory.resolve().name, tuple(samples))


def _captions(sample: TarSample) -> tuple[str, ...]:
    captions = tuple(line.strip() for line in sample.text("txt").splitlines() if not is_blank(line))
    if not captions:
        hint = f"; for classification the set needs {CLASSNAMES}" if "cls" in sample.contents else ""
        raise UserError(f"{sample} has no caption: expected a .txt member with one caption per line{hint}")
    return captions
