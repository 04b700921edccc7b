"""Tables of a report: results by dataset with the best figure marked and chance below, and how runs were trained."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from model.config import config_from_name
from pipeline.evaluation import composition, retrieval, zero_shot
from pipeline.evaluation.results import Result
from pipeline.recipe import Recipe
from pipeline.reporting.report_inputs import Run
from pipeline.training.checkpoint import AVERAGED_WEIGHTS
from pipeline.training.run_logger import format_duration

Item = TypeVar("Item", bound=Hashable)

_TASK_NAMES = {
    zero_shot.TASK.name: "zero-shot classification",
    retrieval.TASK.name: "image-text retrieval",
    composition.TASK.name: "composition",
}
_HEADLINES = ("acc1", "image_retrieval_recall@1", "text_retrieval_recall@1", "acc")


@dataclass(frozen=True)
class Cell:
    """One figure as text; `is_best` marks the best of its column."""

    text: str
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A labelled row; `note` stands small beside the label."""

    label: str
    cells: tuple[Cell, ...]
    note: str = ""
    is_chance: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its heading; `warning` says why its rows may not be compared."""

    title: str
    subtitle: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    warning: str = ""


def dataset_tables(results: Sequence[Result]) -> list[Table]:
    """One table per dataset and task: a row per checkpoint, a column per metric."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dataset, result.task), []).append(result)
    return [_dataset_table(group) for group in groups.values()]


def headline_table(results: Sequence[Result]) -> Table | None:
    """The first figure of every dataset side by side; None where there is one dataset only."""
    columns = _distinct(
        (result.dataset, metric) for result in results for metric in _HEADLINES if metric in result.metrics
    )
    if len({dataset for dataset, _ in columns}) < 2:
        return None
    return Table(
        title="Benchmarks",
        subtitle="The first figures of each dataset, in percent; the best of several is bold.",
        columns=tuple(f"{dataset} {metric_label(metric)}" for dataset, metric in columns),
        rows=_rows(results, columns),
    )


def training_table(runs: Sequence[Run]) -> Table | None:
    """How each run was trained: a column per run; None without runs."""
    if not runs:
        return None
    facts = [_training_facts(run) for run in runs]
    labels = _distinct(label for fact in facts for label in fact)
    rows = tuple(Row(label, tuple(Cell(fact.get(label, "")) for fact in facts)) for label in labels)
    return Table("Training", "", tuple(run.name for run in runs), rows)


def provenance_table(results: Sequence[Result]) -> Table:
    """What each figure was measured on and with, so that results can be told apart."""
    rows = []
    for result in results:
        versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        fields = (
            result.dataset,
            f"{result.samples:,}",
            (result.weights_sha256 or "")[:12],
            (result.template_sha256 or "")[:12],
            versions,
            "" if result.wall_time_s is None else f"{result.wall_time_s:.1f} s",
        )
        rows.append(Row(row_label(result), tuple(map(Cell, fields)), note=_row_note(result)))
    columns = ("dataset", "samples", "weights sha256", "templates sha256", "versions", "wall time")
    return Table("Provenance", "", columns, tuple(rows))


def row_label(result: Result) -> str:
    """The run's name, from RUN/checkpoints/step_N, else the checkpoint's own."""
    parts = Path(result.checkpoint).parts
    if "checkpoints" in parts[1:]:
        run = parts[parts.index("checkpoints", 1) - 1]
        return f"{run}, averaged weights" if parts[-1] == AVERAGED_WEIGHTS else run
    return parts[-1] if parts else result.model


def metric_label(metric: str) -> str:
    """A short name for a column: `image_retrieval_recall@5` -> `image R@5`."""
    if metric == "mean_per_class_recall":
        return "per class"
    return metric.replace("_retrieval_recall@", " R@").removeprefix("acc/")


def _dataset_table(group: Sequence[Result]) -> Table:
    first = group[0]
    counts = _distinct(result.samples for result in group)
    templates = _distinct(result.template_sha256 for result in group)
    warning = ""
    if len(counts) > 1 or len(templates) > 1:
        differing = "numbers of samples" if len(counts) > 1 else "prompt templates"
        warning = f"These rows were measured with different {differing}: they cannot be compared."
    columns = [(first.dataset, metric) for metric in _distinct(name for result in group for name in result.metrics)]
    return Table(
        title=first.dataset,
        subtitle=f"{_TASK_NAMES.get(first.task, first.task)}, {counts[0]:,} samples",
        columns=tuple(metric_label(metric) for _, metric in columns),
        rows=_rows(group, columns),
        warning=warning,
    )


def _rows(results: Sequence[Result], columns: Sequence[tuple[str, str]]) -> tuple[Row, ...]:
    """A row per checkpoint, best figures marked, and the chance row last."""
    checkpoints: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        checkpoints.setdefault((result.model, result.checkpoint), []).append(result)
    figures = [[_find(group, column, "metrics") for column in columns] for group in checkpoints.values()]
    best = [
        max((value for value in values if value is not None), default=None) for values in zip(*figures, strict=True)
    ]
    rows = [
        Row(
            label=row_label(group[0]),
            note=_row_note(group[0]),
            cells=tuple(
                Cell(_percent(value), is_best=len(figures) > 1 and value is not None and value == top)
                for value, top in zip(values, best, strict=True)
            ),
        )
        for group, values in zip(checkpoints.values(), figures, strict=True)
    ]
    chance = [_find(results, column, "chance") for column in columns]
    if any(value is not None for value in chance):
        rows.append(Row("chance", tuple(Cell(_percent(value)) for value in chance), is_chance=True))
    return tuple(rows)


def _find(results: Iterable[Result], column: tuple[str, str], kind: str) -> float | None:
    dataset, metric = column
    for result in results:
        values = result.metrics if kind == "metrics" else result.chance
        if result.dataset == dataset and metric in values:
            return values[metric]
    return None


def _row_note(result: Result) -> str:
    return result.model if result.step is None else f"{result.model}, step {result.step:,}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _training_facts(run: Run) -> dict[str, str]:
    facts: dict[str, str] = {}
    if run.recipe:
        stages = run.recipe.by_stage()
        recipes = [recipe for _, recipe in stages]
        facts["model"] = run.recipe.model.name
        if run.recipe.stages:
            facts["stages"] = "; ".join(str(name) for name, _ in stages)
            facts["images"] = _by_stage(str(_image_size(recipe)) for recipe in recipes) + " px"
        facts["masking"] = _by_stage(_masking(recipe) for recipe in recipes)
        facts["batch"] = _by_stage(f"{recipe.train.global_batch_size:,}" for recipe in recipes) + " pairs"
        facts["learning rate"] = _by_stage(f"{recipe.optimizer.lr:g}" for recipe in recipes)
        facts["weight decay"] = _by_stage(f"{recipe.optimizer.weight_decay:g}" for recipe in recipes)
        facts["seed"] = str(run.recipe.train.seed)
    if run.steps:
        last = run.steps[-1]
        facts["steps"] = f"{last['step']:,}"
        if "samples_seen" in last:
            facts["samples seen"] = f"{last['samples_seen']:,}"
        if "epoch" in last:
            facts["epochs"] = f"{last['epoch']:.2f}"
        if "wall_time_s" in last:
            facts["wall time"] = format_duration(last["wall_time_s"])
        for metric, label in (("samples_per_s", "samples/s, median"), ("tokens_per_s", "tokens/s, median")):
            curves = [stage.curve(metric)[1] for stage in run.by_stage()]
            if any(curves):
                facts[label] = _by_stage(f"{statistics.median(values):,.0f}" for values in curves if values)
        if losses := run.by_stage()[-1].curve("loss")[1]:
            final = losses[-max(1, len(losses) // 20) :]
            facts["loss, last 5 % of the log"] = f"{statistics.fmean(final):.3f}"
    return facts


def _by_stage(facts: Iterable[str]) -> str:
    """One fact if all stages share it, else one for each."""
    each = list(facts)
    return each[0] if len(set(each)) == 1 else "; ".join(each)


def _masking(recipe: Recipe) -> str:
    masking = recipe.masking
    return masking.strategy if masking.strategy == "none" else f"{masking.strategy}, {masking.target_mask_ratio:.0%}"


def _image_size(recipe: Recipe) -> int:
    return recipe.model.image_size or config_from_name(recipe.model.name).vision.image_size


def _distinct(items: Iterable[Item]) -> list[Item]:
    return list(dict.fromkeys(items))
