"""Evaluation as map and reduce: slices of a job leave features on disk, one reducer turns them into results.

A job is one checkpoint on one data set. OUTPUT/jobs/ID/ has job.json, which says what it is, and slice_I_of_N.json for
every slice that has ended.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import write_json
from formats.word_counts import read_word_frequencies
from model.masking import MaskingConfig
from pipeline.evaluation.features import FeatureEncoder, FeatureStore, Slice
from pipeline.evaluation.results import Result
from pipeline.evaluation.sets.files import Collection
from pipeline.evaluation.sets.layouts import ClassificationSet, EvaluationSet, open_evaluation_set
from pipeline.evaluation.tasks.registry import TASKS, tasks_of
from pipeline.evaluation.tasks.task import Task
from pipeline.inference import ModelIdentity
from pipeline.training.run_record import versions

JOBS, JOB_FILE = "jobs", "job.json"


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
        return {
            "format_version": 1,
            "model": self.model.record(),
            "data": str(self.data.resolve()),
            "tasks": [task.option for task in self.tasks],
            "batch_size": self.batch_size,
            "masking": None if self.masking is None else asdict(self.masking),
            "word_counts": self.word_counts,
        }

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
        named = ("name", "weights_sha256", "settings_sha256")
        identity = {name: value for name, value in self.model.record().items() if name in named}
        if collection.kind == "texts":
            return identity | {"tokenizer_sha256": self.model.tokenizer_sha256}
        masking = None if self.masking is None else asdict(self.masking)
        return identity | {"image_size": self.model.image_size, "masking": masking}


def encode_slice(job: Job, encoder: FeatureEncoder, part: Slice, output: Path) -> None:
    """The map step: what is missing of a slice's features, then a note that it has ended (collective)."""
    start_s = time.monotonic()
    stores = {store.directory: store for named in job.stores(output).values() for store in named.values()}
    rows = sum(encoder.encode(store, part) for store in stores.values())
    encoder.ranks.barrier()
    if encoder.ranks.is_main:
        directory = job.directory(output)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / JOB_FILE, job.record())
        note = {
            "rows_of_main_rank": rows,
            "seconds": round(time.monotonic() - start_s, 3),
            "world_size": encoder.ranks.world_size,
            "device": str(encoder.ranks.device),
        }
        write_json(directory / f"slice_{part.index}_of_{part.count}.json", note)
    encoder.ranks.barrier()


def score_job(job: Job, output: Path) -> list[Result]:
    """The reduce step: results of a job whose features are complete.

    Raises UserError that names the collection and the slices that have not ended, if they are not.
    """
    stores = job.stores(output)
    dataset = _with_words(job.dataset, job.word_counts)
    results = []
    for task in job.tasks:
        start_s = time.monotonic()
        try:
            loaded = {name: store.load() for name, store in stores[task.option].items()}
        except UserError as error:
            raise UserError(f"{job.dataset.name}: {error}; {_what_to_run(job, output)}") from None
        scores = task.score(dataset, {name: features for name, (features, _) in loaded.items()})
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
                details=scores.details,
                versions=versions(),
                wall_time_s=round(_slice_seconds(job.directory(output)) + time.monotonic() - start_s, 3),
            )
        )
    return results


def _with_words(dataset: EvaluationSet, word_counts: str | None) -> EvaluationSet:
    if word_counts is None or not isinstance(dataset, ClassificationSet):
        return dataset
    return replace(dataset, words=read_word_frequencies(word_counts))


def read_jobs(output: Path) -> list[Job]:
    """The jobs whose slices wrote into an output directory, their data sets opened again.

    Raises UserError if there is none, or if a data set is gone or no longer fits.
    """
    files = job_files(output)
    if not files:
        raise UserError(f"nothing to collect in {output}: no slice of an evaluation has ended there")
    return [read_job(file) for file in files]


def job_files(output: Path) -> list[Path]:
    """The records of the jobs of an output directory."""
    return sorted((output / JOBS).glob(f"*/{JOB_FILE}"))


def read_job(file: Path) -> Job:
    """The job of a record, its data set opened again; raises UserError as `read_jobs` does."""
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        masking = record["masking"]
        return Job(
            model=ModelIdentity(**record["model"]),
            data=Path(record["data"]),
            dataset=open_evaluation_set(Path(record["data"])),
            tasks=tuple(TASKS[option] for option in record["tasks"]),
            batch_size=int(record["batch_size"]),
            masking=None if masking is None else MaskingConfig(**masking),
            word_counts=record.get("word_counts"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not describe an evaluation job ({error!r}): delete it and evaluate again"
        ) from error


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


def _ended_slices(directory: Path) -> Mapping[int, set[int]]:
    """Which slices have ended, by how many there are in all."""
    ended: dict[int, set[int]] = {}
    for path in directory.glob("slice_*_of_*.json"):
        index, _, count = path.stem.removeprefix("slice_").partition("_of_")
        ended.setdefault(int(count), set()).add(int(index))
    return ended


def _slice_seconds(directory: Path) -> float:
    return sum(float(json.loads(path.read_text())["seconds"]) for path in directory.glob("slice_*_of_*.json"))


def _what_to_run(job: Job, output: Path) -> str:
    ended = _ended_slices(job.directory(output))
    count = max(ended, default=1)
    open_slices = [f"{index}/{count}" for index in range(count) if index not in ended.get(count, set())]
    if not open_slices:
        return "run evaluate.py on it again without --slice: it encodes what is missing"
    return f"these slices have not ended: {', '.join(open_slices)}; run evaluate.py with --slice {open_slices[0]}"
