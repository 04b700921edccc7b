"""What a report is made of: runs, the checkpoints that were evaluated, and evaluation jobs, found in the paths given.

A checkpoint and the run that wrote it are told by whole paths and by the hash of the weights. Names are for readers:
the shortest ends of the paths that differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from formats.errors import UserError
from pipeline.evaluation.jobs import Job, job_files, read_job
from pipeline.evaluation.results import RESULTS_FILE, ModelIdentity, Result, read_results
from pipeline.evaluation.sets.layouts import EvaluationSet
from pipeline.evaluation.tasks.task import Features, Task
from pipeline.reporting.runs import CHECKPOINTS, Cost, Run, read_run
from pipeline.training.checkpoints.checkpoint import AVERAGED_WEIGHTS, WEIGHTS
from pipeline.training.observing.run_logger import METRICS

EVALUATION = "evaluation"  # in a run's directory


@dataclass(frozen=True)
class Checkpoint:
    """Weights that were evaluated, and the run that wrote them if it is among those given."""

    label: str
    results: tuple[Result, ...]
    run: Run | None = None

    @property
    def step(self) -> int | None:
        """The step after which they were written, if known."""
        return self.results[0].step

    @property
    def note(self) -> str:
        """The model and the step."""
        model = self.results[0].model
        return model if self.step is None else f"{model}, step {self.step:,}"

    @property
    def is_averaged(self) -> bool:
        """Whether they are the moving average of a run's weights."""
        return Path(self.results[0].checkpoint).name == AVERAGED_WEIGHTS

    @property
    def cost(self) -> Cost | None:
        """What they had cost when they were written; None if that is not known."""
        return None if self.run is None or self.step is None else self.run.cost_at(self.step)


@dataclass(frozen=True)
class StoredJob:
    """An evaluation job whose data set is there, where its features are, and what tables call its checkpoint."""

    job: Job
    output: Path
    label: str

    def features(self, task: Task) -> Features:
        """All features that a task needs. Raises UserError if they are not whole."""
        return {name: store.load()[0] for name, store in self.job.stores(self.output)[task.option].items()}


@dataclass(frozen=True)
class ReportInputs:
    """All runs and checkpoints, in the order given; what is found twice counts once.

    jobs: of the evaluations; job_notes: why some cannot be shown: their data set is gone, say
    """

    runs: tuple[Run, ...]
    checkpoints: tuple[Checkpoint, ...]
    jobs: tuple[StoredJob, ...] = ()
    job_notes: tuple[str, ...] = ()


def read_inputs(paths: Sequence[Path]) -> ReportInputs:
    """Read run directories, directories with results, and results files.

    Raises UserError for a path that is none of these, and for a file in them that is not what it should be.
    """
    runs: dict[Path, Run] = {}
    found: list[tuple[Result, Path]] = []
    outputs: dict[Path, None] = {}
    for path in paths:
        result_files = _result_files(path)
        is_run = (path / METRICS).exists()
        if not result_files and not is_run:
            raise UserError(
                f"nothing to report in {path}: expected a run directory ({METRICS}), a directory with {RESULTS_FILE}, "
                f"or such a file"
            )
        if is_run:
            runs[path.resolve()] = read_run(path)
        found += [(result, file.resolve()) for file in result_files for result in read_results(file)]
        outputs |= dict.fromkeys(file.resolve().parent for file in result_files)
    named_runs, checkpoints = name_checkpoints(found, list(runs.values()))
    jobs, notes = read_jobs(outputs, checkpoints)
    return ReportInputs(named_runs, checkpoints, tuple(jobs), tuple(notes))


def name_checkpoints(
    found: Sequence[tuple[Result, Path]], runs: Sequence[Run]
) -> tuple[tuple[Run, ...], tuple[Checkpoint, ...]]:
    """The runs with names that differ, and the results of each checkpoint, given with the files they are from."""
    origins: dict[tuple[str, str | None, Path], tuple[Path, Run | None]] = {}
    groups: dict[tuple[Path, Path, str, str | None], dict[tuple[str, str, str | None], Result]] = {}
    writers: dict[tuple[Path, Path, str, str | None], Run | None] = {}
    for result, file in found:
        run_path, rest = _split(result)
        what = (result.checkpoint or result.model, result.weights_sha256, file)
        if what not in origins:
            is_alone = all(_split(other)[0] == run_path for other, of_file in found if of_file == file)
            origins[what] = _origin(result, file, is_alone, runs)
        where, run = origins[what]
        key = (where, rest, result.model, result.weights_sha256)
        writers[key] = run
        groups.setdefault(key, {})[result.dataset, result.task, result.content_sha256] = result
    names = shortest_names([*(run.directory for run in runs), *(where for where, *_ in groups)])
    named = {run.directory: replace(run, name=names[run.directory]) for run in runs}
    twins = Counter((where, rest, model) for where, rest, model, _ in groups)
    checkpoints = []
    for key, results in groups.items():
        where, rest, model, weights_sha256 = key
        label = names[where] + (", averaged weights" if rest.name == AVERAGED_WEIGHTS else "")
        if twins[where, rest, model] > 1:
            label += f" ({(weights_sha256 or 'unknown weights')[:8]})"
        run = writers[key]
        checkpoints.append(Checkpoint(label, tuple(results.values()), run and named[run.directory]))
    return tuple(named.values()), tuple(checkpoints)


def shortest_names(paths: Iterable[Path]) -> dict[Path, str]:
    """For each path its shortest end that no other path has: `A/seed0` and `B/seed0`, but `first` and `second`."""
    ends = {path: [str(Path(*path.parts[-count:])) for count in range(1, len(path.parts) + 1)] for path in paths}
    counts = Counter(end for own in ends.values() for end in own)
    return {path: next((end for end in own if counts[end] == 1), str(path)) for path, own in ends.items()}


def newest_of_each_set(jobs: Sequence[StoredJob], kind: type[EvaluationSet], task: Task) -> Iterator[StoredJob]:
    """For each set of a kind with a task, the job of the checkpoint with the most steps, of equal ones the first."""
    newest: dict[tuple[Path, str], StoredJob] = {}
    for job in jobs:
        if task not in job.job.tasks or not isinstance(job.job.dataset, kind):
            continue
        other = newest.setdefault((job.job.data, job.job.dataset_name), job)
        if (job.job.model.step or 0) > (other.job.model.step or 0):
            newest[job.job.data, job.job.dataset_name] = job
    yield from newest.values()


def _split(evaluated: Result | ModelIdentity) -> tuple[Path, Path]:
    """A checkpoint's path as that of its run and the rest, RUN/checkpoints/step_N; without a run the whole path."""
    name = evaluated.model if isinstance(evaluated, Result) else evaluated.name
    parts = Path(evaluated.checkpoint or name).parts
    at = parts.index(CHECKPOINTS, 1) if CHECKPOINTS in parts[1:] else len(parts)
    return Path(*parts[:at]), Path(*parts[at:])


def _origin(result: Result, file: Path, is_alone: bool, runs: Sequence[Run]) -> tuple[Path, Run | None]:
    """Where a result's checkpoint is from, and the run that wrote it: by the hash of its weights, else by whole path.

    A run that was moved without its checkpoints is known by `evaluation/` in it, if all results there are of one run
    (`is_alone`).
    """
    run_path, rest = _split(result)
    # an evaluation wrote down a path from where it was started: a folder above its results, or this one
    homes = ((base / run_path).resolve() for base in (*file.parents, Path.cwd()))
    home = next((home for home in homes if home.exists()), None)
    if same := [run for run in runs if result.weights_sha256 in run.weights.values()]:
        run = next((run for run in same if run.directory == home), same[0])
        return run.directory, run
    if home is None and is_alone:
        named = [run.directory for run in runs if run.directory.name == run_path.name]
        home = next((directory for directory in named if directory / EVALUATION == file.parent), None)
    # what lies there now may have been trained anew
    weights_file = str(rest if rest.name == AVERAGED_WEIGHTS else rest / WEIGHTS)
    wrote_it = (run for run in runs if run.weights.get(weights_file) in (None, result.weights_sha256))
    return home or run_path, next((run for run in wrote_it if run.directory == home and rest.parts), None)


def _result_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in (path / RESULTS_FILE, path / EVALUATION / RESULTS_FILE) if file.exists()]


def read_jobs(outputs: Iterable[Path], checkpoints: Collection[Checkpoint]) -> tuple[list[StoredJob], list[str]]:
    """The jobs of evaluation outputs; and, as notes, why some cannot be shown: their data set is gone, say."""
    jobs, notes = [], []
    for output in outputs:
        for file in job_files(output):
            try:
                job = read_job(file)
            except UserError as error:
                notes.append(f"No pictures of {file.parent.name}: {error}.")
            else:
                jobs.append(StoredJob(job, output, _label_of(job.model, checkpoints)))
    return jobs, notes


def _label_of(model: ModelIdentity, checkpoints: Collection[Checkpoint]) -> str:
    """A job's checkpoint and step as tables call them."""
    label = _split(model)[0].name
    for checkpoint in checkpoints:
        first = checkpoint.results[0]
        is_same = first.weights_sha256 in (None, model.weights_sha256)
        if is_same and (first.model, first.checkpoint) == (model.name, model.checkpoint):
            label = checkpoint.label
    return label if model.step is None else f"{label}, step {model.step:,}"
