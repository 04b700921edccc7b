"""What a report is made of: runs (recipe, metrics), results and evaluation jobs, found in the paths given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.errors import UserError
from pipeline.evaluation.jobs import Job, job_files, read_job
from pipeline.evaluation.results import RESULTS_FILE, Result, read_results
from pipeline.evaluation.sets.layouts import EvaluationSet
from pipeline.evaluation.tasks.task import Features, Task
from pipeline.recipe import Recipe
from pipeline.recipe_files import read_recipe_file
from pipeline.reporting.tables.rows import checkpoint_label
from pipeline.training.observing.run_logger import METRICS
from pipeline.training.run_record import read_record

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Run:
    """One training run: its directory's name, its recipe, its logged steps in order, and where it last started."""

    name: str
    recipe: Recipe | None
    steps: tuple[dict[str, Any], ...]
    world_size: int = 1
    device: str = ""

    def by_stage(self) -> list[Run]:
        """The logged steps of each stage as runs of their own, of the same name; the run itself if it has no stages."""
        groups = itertools.groupby(self.steps, key=lambda step: step.get("stage"))
        return [replace(self, steps=tuple(steps)) for _, steps in groups] or [self]

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Samples seen (else steps) and values of a metric, at the logged steps that have both."""
        points = []
        for step in self.steps:
            position, value = step.get("samples_seen", step.get("step")), step.get(metric)
            if isinstance(position, (int, float)) and isinstance(value, (int, float)):
                points.append((float(position), float(value)))
        return [position for position, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class ReportInputs:
    """All runs and results, in the order given; a result that is found twice counts once.

    outputs: the directories of the results, where an evaluation leaves its features too
    """

    runs: tuple[Run, ...]
    results: tuple[Result, ...]
    outputs: tuple[Path, ...]


def read_inputs(paths: Sequence[Path]) -> ReportInputs:
    """Read run directories, directories with results, and results files.

    Raises UserError for a path that is none of these, and if nothing at all is found.
    """
    runs: list[Run] = []
    results: dict[tuple[str, str, str, str], Result] = {}
    outputs: dict[Path, None] = {}
    for path in paths:
        result_files = _result_files(path)
        is_run = (path / METRICS).is_file()
        if not result_files and not is_run:
            raise UserError(
                f"nothing to report in {path}: expected a run directory ({METRICS}), a directory with {RESULTS_FILE}, "
                f"or such a file"
            )
        if is_run:
            runs.append(_read_run(path))
        results.update({result.key: result for file in result_files for result in read_results(file)})
        outputs |= dict.fromkeys(file.resolve().parent for file in result_files)
    return ReportInputs(tuple(runs), tuple(results.values()), tuple(outputs))


def _result_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in (path / RESULTS_FILE, path / "evaluation" / RESULTS_FILE) if file.is_file()]


def _read_run(directory: Path) -> Run:
    recipe, record = directory / RECIPE_FILE, read_record(directory)
    return Run(
        name=directory.resolve().name,
        recipe=read_recipe_file(str(recipe)) if recipe.is_file() else None,
        steps=tuple(_read_steps(directory / METRICS)),
        world_size=int(record.get("world_size", 1)),
        device=str(record.get("device", "")),
    )


def _read_steps(file: Path) -> list[dict[str, Any]]:
    """Logged steps in order. A line that was cut off is passed over; of a step logged twice the later line counts."""
    steps: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            fields = json.loads(line)
            steps[int(fields["step"])] = fields
        except (ValueError, KeyError, TypeError):
            continue
    return [steps[step] for step in sorted(steps)]


@dataclass(frozen=True)
class Cost:
    """Hours of training up to a step. `device_h`: times the ranks of the run's last start."""

    wall_h: float
    device_h: float


def run_of(result: Result, runs: Sequence[Run]) -> Run | None:
    """The run that wrote a result's checkpoint, RUN/checkpoints/step_N; None unless exactly one of `runs` fits."""
    parts = Path(result.checkpoint).parts
    if "checkpoints" not in parts[1:]:
        return None
    name = parts[parts.index("checkpoints", 1) - 1]
    fitting = [run for run in runs if run.name == name]
    return fitting[0] if len(fitting) == 1 else None


def cost_of(result: Result, runs: Sequence[Run]) -> Cost | None:
    """The cost of a result's checkpoint: the wall time logged last at or before its step; None if not logged."""
    run = run_of(result, runs)
    if run is None or result.step is None:
        return None
    return cost_at(run, result.step)


def cost_at(run: Run, step: int) -> Cost | None:
    """The cost of a run up to a step."""
    times_s = [line["wall_time_s"] for line in run.steps if line["step"] <= step and "wall_time_s" in line]
    if not times_s:
        return None
    wall_h = max(times_s) / 3600
    return Cost(wall_h, wall_h * run.world_size)


def device_hours_label(runs: Sequence[Run]) -> str:
    """What to call them: GPU-hours only where all runs were on GPUs."""
    return "GPU-hours" if runs and all(run.device.startswith("cuda") for run in runs) else "device-hours"


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
