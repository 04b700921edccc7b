"""The three evaluation layouts, checked and typed: what they hold is docs/evaluation.md's first section.

Zero-shot classification and retrieval are CLIP_benchmark's webdatasets; composition is SugarCrepe's JSON files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.errors import UserError
from pipeline.evaluation.expectations import DATASET_FILE, Expectations
from pipeline.evaluation.set_files import read_json_object, read_lines, split_samples
from pipeline.evaluation.tar_samples import ImageFile, TarSample

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class ClassificationSample:
    """One image and the index of its class."""

    image: ImageFile
    label: int


@dataclass(frozen=True)
class ClassificationSet:
    """Images of known classes; `{c}` in a template stands for the class name."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    samples: tuple[ClassificationSample, ...]
    expected_samples: int | None = None
    directory: Path | None = None

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


EvaluationSet = ClassificationSet | RetrievalSet | CompositionSet


def open_evaluation_set(directory: Path) -> EvaluationSet:
    """Read the evaluation set in a directory, whichever of the three layouts it has.

    Raises UserError, naming the file and what was expected of it, for everything that does not fit the layout.
    """
    if not directory.is_dir():
        raise UserError(f"no evaluation set at {directory}: there is no such directory")
    expectations = Expectations.of(directory)
    if (directory / "images").is_dir():
        dataset: EvaluationSet = _read_composition_set(directory)
    elif _is_classification(directory):
        dataset = _read_classification_set(directory, expectations)
    elif (directory / "test").is_dir():
        dataset = _read_retrieval_set(directory, expectations)
    else:
        raise UserError(
            f"no evaluation set in {directory}: expected test/ with {CLASSNAMES} (zero-shot), test/ alone (retrieval) "
            "or images/ with *.json (composition)"
        )
    return replace(dataset, expected_samples=expectations.check_samples(len(dataset.samples)))


def _is_classification(directory: Path) -> bool:
    declared = directory / "dataset_type.txt"
    if declared.is_file():
        return declared.read_text(encoding="utf-8").strip() != "retrieval"
    return (directory / CLASSNAMES).exists() or (directory / TEMPLATES).exists()


def _read_classification_set(directory: Path, expectations: Expectations) -> ClassificationSet:
    class_names = read_lines(directory / CLASSNAMES)
    templates = read_lines(directory / TEMPLATES)
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{directory / TEMPLATES}: template {template!r} has no {{c}} for the class name")
    samples = _labelled_samples(directory, "test", len(class_names))
    expectations.check_classes(class_names, {sample.label for sample in samples}, directory / CLASSNAMES)
    return ClassificationSet(directory.resolve().name, class_names, templates, samples, directory=directory)


def _labelled_samples(directory: Path, split: str, num_classes: int) -> tuple[ClassificationSample, ...]:
    samples = split_samples(directory / split)
    return tuple(ClassificationSample(sample.require_image(), _label(sample, num_classes)) for sample in samples)


def _label(sample: TarSample, num_classes: int) -> int:
    text = sample.texts.get("cls", "").strip()
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{sample} has no class index: expected a .cls member with an integer, found {text!r}")
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
    captions = tuple(line.strip() for line in sample.texts.get("txt", "").splitlines() if line.strip())
    if not captions:
        hint = f"; for classification the set needs {CLASSNAMES}" if "cls" in sample.texts else ""
        raise UserError(f"{sample} has no caption: expected a .txt member with one caption per line{hint}")
    return captions


def _read_composition_set(directory: Path) -> CompositionSet:
    files = sorted(path for path in directory.glob("*.json") if path.name != DATASET_FILE)
    if not files:
        raise UserError(f"no categories in {directory}: expected files such as swap_att.json beside images/")
    samples = tuple(sample for file in files for sample in _category_samples(file, directory / "images"))
    return CompositionSet(directory.resolve().name, samples)


def _category_samples(file: Path, images: Path) -> list[CompositionSample]:
    entries = read_json_object(file)
    if not entries:
        raise UserError(f"{file} is empty: expected entries with filename, caption, negative_caption")
    samples = []
    for index, entry in entries.items():
        fields = entry if isinstance(entry, dict) else {}
        texts = [fields.get(name) for name in ("filename", "caption", "negative_caption")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{file}, entry {index}: expected strings filename, caption and negative_caption")
        filename, caption, negative = map(str, texts)
        if Path(filename).name != filename:
            raise UserError(f"{file}, entry {index}: filename {filename!r} must lie directly in images/")
        try:
            image = ImageFile.whole(images / filename)
        except OSError as error:
            raise UserError(f"{file}, entry {index}: missing image {images / filename}") from error
        samples.append(CompositionSample(image, file.stem, caption, negative))
    return samples
