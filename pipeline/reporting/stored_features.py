"""Evaluation jobs whose features and data sets are still on the disk: what the pictures of a report are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.errors import UserError
from pipeline.evaluation.jobs import Job, job_files, read_job
from pipeline.evaluation.sets.layouts import EvaluationSet
from pipeline.evaluation.tasks.task import Features, Task
from pipeline.reporting.result_rows import checkpoint_label


@dataclass(frozen=True)
class StoredJob:
    """A job and where its features are."""

    job: Job
    output: Path

    @property
    def label(self) -> str:
        """The checkpoint and its step, as tables call them."""
        model = self.job.model
        label = checkpoint_label(model.checkpoint) or model.name
        return label if model.step is None else f"{label}, step {model.step:,}"

    def features(self, task: Task) -> Features:
        """All features that a task needs. Raises UserError if they are not whole."""
        return {name: store.load()[0] for name, store in self.job.stores(self.output)[task.option].items()}


def find_jobs(outputs: Sequence[Path]) -> tuple[list[StoredJob], list[str]]:
    """The jobs of evaluation outputs; and, as notes, why some cannot be shown: their data set is gone, say."""
    jobs, notes = [], []
    for output in outputs:
        for file in job_files(output):
            try:
                jobs.append(StoredJob(read_job(file), output))
            except UserError as error:
                notes.append(f"No pictures of {file.parent.name}: {error}.")
    return jobs, notes


def newest_of_each_set(jobs: Sequence[StoredJob], kind: type[EvaluationSet], task: Task) -> Iterator[StoredJob]:
    """For each set of a kind with a task, the job of the checkpoint with the most steps, of equal ones the first."""
    newest: dict[str, StoredJob] = {}
    for job in jobs:
        if task not in job.job.tasks or not isinstance(job.job.dataset, kind):
            continue
        other = newest.get(job.job.dataset_name)
        if other is None or (job.job.model.step or 0) > (other.job.model.step or 0):
            newest[job.job.dataset_name] = job
    yield from newest.values()
