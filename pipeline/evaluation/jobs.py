"""Evaluation as map and reduce: slices of a job leave features on disk, one reducer turns them into results.

A job is one checkpoint on one data set. OUTPUT/jobs/ID/ has job.json, which says what it is, and slice_I_of_N.json for
every slice that has ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, TypeAdapter, ValidationError

from formats.errors import UserError
from formats.files import make_folder, read_json, write_json
from formats.word_counts import read_word_frequencies
from model.masking import MaskingConfig
from pipeline.evaluation.features import FeatureEncoder, FeatureStore
from pipeline.evaluation.results import ModelIdentity, Result
from pipeline.evaluation.sets.files import Collection
from pipeline.evaluation.sets.layouts import ClassificationSet, EvaluationSet, open_evaluation_set
from pipeline.evaluation.tasks import composition, linear_probe, retrieval, zero_shot
from pipeline.evaluation.tasks.task import Task
from pipeline.ranks import Ranks
from pipeline.versions import versions

CPU = torch.device("cpu")
Failure: TypeAlias = UserError | OSError

JOBS, JOB_FILE = "jobs", "job.json"
_NOTE = re.compile(r"slice_(\d{1,9})_of_(\d{1,9})\.json")


TASKS: dict[str, Task] = {
    task.option: task
    for task in (
        zero_shot.TASK,
        retrieval.TASK,
        composition.TASK,
        composition.GROUP_TASK,
        linear_probe.TASK,
        linear_probe.FEW_SHOT_TASK,
    )
}


def tasks_of(dataset: EvaluationSet, options: Sequence[str] | None) -> tuple[Task, ...]:
    """The tasks that fit a data set: those that `options` name, or all but probes. UserError for an unknown option."""
    for option in options or ():
        if option not in TASKS:
            raise UserError(f"unknown task {option!r}: --tasks takes auto, or a list of {', '.join(TASKS)}")
    wanted = [task for task in TASKS.values() if not task.is_probe] if options is None else [TASKS[o] for o in options]
    has_train = isinstance(dataset, ClassificationSet) and dataset.has_split("train")
    return tuple(task for task in wanted if isinstance(dataset, task.sets) and (has_train or not task.is_probe))


@dataclass(frozen=True)
class Slice:
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> Slice:
        """Read "i/n"; raises argparse.ArgumentTypeError for anything else."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise argparse.ArgumentTypeError(f"{text!r} is no slice: give i/n with 0 <= i < n, e.g. 0/4")
        return Slice(int(index), int(count))

    def share(self, total: int, ranks: Ranks) -> range:
        """This slice's and rank's share of `total` things: contiguous, sizes differ by one at most within a slice."""
        first, end = total * self.index // self.count, total * (self.index + 1) // self.count
        size = end - first
        return range(first + size * ranks.rank // ranks.world_size, first + size * (ranks.rank + 1) // ranks.world_size)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class _Record:
    """job.json."""

    model: ModelIdentity
    data: str
    tasks: list[str]
    batch_size: Annotated[int, Field(gt=0)]
    masking: MaskingConfig | None = None
    word_counts: str | None = None
    format_version: Literal[1] = 1


@dataclass(frozen=True)
class Job:
    """One model on one data set. On request only: masking of the images, word counts of the training captions."""

    model: ModelIdentity
    data: Path
    dataset: EvaluationSet
    tasks: tuple[Task, ...]
    batch_size: int
    masking: MaskingConfig | None = None
    word_counts: str | None = None

    @property
    def dataset_name(self) -> str:
        """The data set as results call it."""
        if self.masking is None:
            return self.dataset.name
        return f"{self.dataset.name}, masked ({self.masking.strategy} {self.masking.mask_ratio(1.0):.0%})"

    def record(self) -> dict[str, Any]:
        """What collecting needs to know, as plain values."""
        options = [task.option for task in self.tasks]
        data = str(self.data.resolve())
        record = _Record(self.model, data, options, self.batch_size, self.masking, self.word_counts)
        return asdict(record) | {"model": _known_fields(self.model)}

    def directory(self, output: Path) -> Path:
        """Where its record and its slices' are."""
        fields = {name: value for name, value in self.record().items() if name not in ("tasks", "word_counts")}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return output / JOBS / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', self.dataset.name)}-{digest[:16]}"

    def stores(self, output: Path) -> dict[str, dict[str, FeatureStore]]:
        """The features of every task by the names it has for them; equal collections share a store."""
        return {
            task.option: {
                name: FeatureStore(output, collection, self._features_of(collection), self.batch_size)
                for name, collection in task.collections(self.dataset).items()
            }
            for task in self.tasks
        }

    def _features_of(self, collection: Collection) -> dict[str, Any]:
        named = ("name", "weights_sha256", "settings_sha256", "precision")
        identity = {name: value for name, value in _known_fields(self.model).items() if name in named}
        if collection.kind == "texts":
            return identity | {"tokenizer_sha256": self.model.tokenizer_sha256}
        masking = None if self.masking is None else asdict(self.masking)
        return identity | {"image_size": self.model.image_size, "masking": masking}


def _known_fields(model: ModelIdentity) -> dict[str, Any]:
    return {name: value for name, value in asdict(model).items() if value != ""}


def encode_slice(job: Job, encoder: FeatureEncoder, part: Slice, output: Path) -> None:
    """The map step: what is missing of a slice's features, then a note that it has ended.

    Collective: whatever a rank cannot encode, of an image, a split or a disk, is a UserError of all.
    """
    start_s = time.monotonic()
    ranks = encoder.ranks

    def encode_share() -> int:
        stores = {store.directory: store for named in job.stores(output).values() for store in named.values()}
        return sum(encoder.encode(store, part.share(store.num_batches, ranks)) for store in stores.values())

    rows = ranks.together(encode_share)
    if ranks.is_main:
        directory = make_folder(job.directory(output))
        write_json(directory / JOB_FILE, job.record())
        note = {
            "rows_of_main_rank": rows,
            "seconds": round(time.monotonic() - start_s, 3),
            "world_size": ranks.world_size,
            "device": str(ranks.device),
        }
        write_json(directory / f"slice_{part.index}_of_{part.count}.json", note)


def score_job(job: Job, output: Path, device: torch.device = CPU, is_checked: bool = False) -> list[Result]:
    """The reduce step: results of a job whose features are complete.

    device: for tasks that fit something to the features
    is_checked: the features have just been compared with what the set holds
    Raises UserError that names the collection and the slices that have not ended, if they are not.
    """
    stores = job.stores(output)
    dataset = _with_words(job.dataset, job.word_counts)
    results = []
    for task in job.tasks:
        start_s = time.monotonic()
        try:
            loaded = {name: store.load(is_checked) for name, store in stores[task.option].items()}
        except UserError as error:
            raise UserError(f"{job.dataset.name}: {error}; {_what_to_run(job, output)}") from None
        where = device if task.is_probe else CPU
        scores = task.score(dataset, {name: features.to(where) for name, (features, _) in loaded.items()})
        content = hashlib.sha256("".join(sha256 for _, sha256 in loaded.values()).encode()).hexdigest()
        results.append(
            Result(
                model=job.model.name,
                checkpoint=job.model.checkpoint,
                dataset=job.dataset_name,
                task=task.name,
                metrics=scores.metrics,
                chance=scores.chance,
                intervals=scores.intervals,
                samples=scores.samples,
                expected_samples=job.dataset.expected_samples,
                template_sha256=scores.template_sha256,
                content_sha256=content,
                weights_sha256=job.model.weights_sha256,
                step=job.model.step,
                samples_seen=job.model.samples_seen,
                batch_size=job.batch_size,
                details=scores.details | ({"precision": job.model.precision} if job.model.precision else {}),
                versions=versions(),
                wall_time_s=round(_slice_seconds(job.directory(output)) + time.monotonic() - start_s, 3),
            )
        )
    return results


def _with_words(dataset: EvaluationSet, word_counts: str | None) -> EvaluationSet:
    if word_counts is None or not isinstance(dataset, ClassificationSet):
        return dataset
    return replace(dataset, words=read_word_frequencies(word_counts))


def job_files(output: Path) -> list[Path]:
    """The records of the jobs whose slices wrote into an output directory."""
    return sorted((output / JOBS).glob(f"*/{JOB_FILE}"))


def read_job(file: Path) -> Job:
    """The job of a record, its data set opened again; raises UserError if it is gone or no longer fits."""
    try:
        record = TypeAdapter(_Record).validate_python(read_json(file))
        tasks = tuple(TASKS[option] for option in record.tasks)
    except (ValidationError, KeyError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"unknown task {error}"
        raise UserError(f"{file} describes no evaluation job ({problem}): delete it and evaluate again") from None
    data = Path(record.data)
    return Job(
        record.model, data, open_evaluation_set(data), tasks, record.batch_size, record.masking, record.word_counts
    )


def make_job(
    model: ModelIdentity,
    data: Path,
    dataset: EvaluationSet,
    options: Sequence[str] | None,
    batch_size: int,
    masking: MaskingConfig | None,
    word_counts: str | None = None,
) -> Job:
    """The job of a model on a data set: the tasks in `options` that fit it, or all that fit if None."""
    return Job(model, data, dataset, tasks_of(dataset, options), batch_size, masking, word_counts)


def raise_first(failures: Sequence[Failure]) -> None:
    """End a program that did what it could: the first error is raised, the others are said on stderr."""
    for failure in failures[1:]:
        print(f"error: {failure}", file=sys.stderr, flush=True)
    if failures:
        raise failures[0]


def _slice_notes(directory: Path) -> Iterator[tuple[re.Match[str], Path]]:
    for path in directory.glob("slice_*.json"):
        if match := _NOTE.fullmatch(path.name):
            yield match, path


def _slice_seconds(directory: Path) -> float:
    seconds = [read_json(path).get("seconds") for _, path in _slice_notes(directory)]
    return sum(value for value in seconds if isinstance(value, int | float))


def _what_to_run(job: Job, output: Path) -> str:
    ended: dict[int, set[int]] = {}  # by how many there are in all
    for match, _ in _slice_notes(job.directory(output)):
        ended.setdefault(int(match[2]), set()).add(int(match[1]))
    count = max(ended, default=1)
    open_slices = [f"{index}/{count}" for index in range(count) if index not in ended.get(count, set())]
    if not open_slices:
        return "run evaluate.py on it again without --slice: it encodes what is missing"
    return f"these slices have not ended: {', '.join(open_slices)}; run evaluate.py with --slice {open_slices[0]}"
