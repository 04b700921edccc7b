"""The report's own tables: first figures side by side, all by data set, provenance, and how runs were trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from model.config import config_from_name
from pipeline.evaluation.results import Result
from pipeline.evaluation.sets.known import set_key
from pipeline.evaluation.tasks import composition, linear_probe, retrieval, zero_shot
from pipeline.evaluation.tasks.rarity import BY_RARITY
from pipeline.recipe import Recipe
from pipeline.reporting.inputs import Checkpoint
from pipeline.reporting.runs import Run, device_hours_label
from pipeline.reporting.tables.paper_tables import entry_figures, format_interval, paper_table
from pipeline.reporting.tables.papers import RARITY, Measure, PaperLayout, Published
from pipeline.reporting.tables.rows import by_recipe
from pipeline.reporting.tables.table import Cell, Column, Row, Table, distinct, mark_places, percent
from pipeline.training.observing.run_logger import format_duration

_TASK_NAMES = {
    zero_shot.TASK.name: "zero-shot classification",
    retrieval.TASK.name: "image-text retrieval",
    composition.TASK.name: "composition",
    linear_probe.TASK.name: "linear probe",
    linear_probe.FEW_SHOT_TASK.name: "linear probe on few images",
}
# The means that `composition` takes, and how the names end of what each is the mean of.
_MEANS = {"acc": "", "acc/object": "_obj", "acc/attribute": "_att", "acc/relation": "_rel"}
Measured = tuple[Checkpoint, Result]
HEADLINES = ("acc1", "mean_average_precision", "image_retrieval_recall@1", "text_retrieval_recall@1", "acc")


def dataset_tables(checkpoints: Sequence[Checkpoint]) -> list[Table]:
    """One table per dataset and task: a row per checkpoint, a column per metric."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for checkpoint, result in _measured(checkpoints):
        groups.setdefault((result.dataset, result.task), []).append((checkpoint, result))
    return [_dataset_table(group, number) for number, group in enumerate(groups.values())]


def headline_table(checkpoints: Sequence[Checkpoint], runs: Sequence[Run] = ()) -> Table | None:
    """The first figures of every dataset side by side, and the cost; None where there are none."""
    layout = PaperLayout(
        "benchmarks",
        "Benchmarks",
        "The first figures of each dataset, in percent; of several the best is bold, the second underlined.",
        tuple(
            Measure(f"{dataset} {metric}", metric_label(metric), (set_key(dataset),), metric, heading=dataset)
            for dataset, metric in headline_columns(checkpoints)
        ),
    )
    return paper_table(layout, by_recipe(checkpoints), Published(), device_hours_label(runs))


def rarity_table(checkpoints: Sequence[Checkpoint], published: Published, runs: Sequence[Run] = ()) -> Table | None:
    """Accuracy on a set of rare classes, and of every set by how rare its classes are; None where there is neither."""
    columns = dict.fromkeys(
        (result.dataset, metric)
        for _, result in _measured(checkpoints)
        for metric in result.metrics
        if metric.startswith(BY_RARITY)
    )
    by_thirds = (
        Measure(f"{dataset} {metric}", metric_label(metric), (set_key(dataset),), metric, heading=dataset)
        for dataset, metric in columns
    )
    layout = replace(RARITY, measures=(*RARITY.measures, *by_thirds))
    entries = by_recipe(checkpoints)
    beside = published if any(entry_figures(RARITY, entry) for entry in entries) else Published()
    return paper_table(layout, entries, beside, device_hours_label(runs))


def headline_columns(checkpoints: Sequence[Checkpoint]) -> list[tuple[str, str]]:
    """The first figures of each dataset: (dataset, metric). A set that goes by two names is one."""
    columns: dict[tuple[str, str], tuple[str, str]] = {}
    for _, result in _measured(checkpoints):
        for metric in HEADLINES:
            if metric in result.metrics:
                columns.setdefault((set_key(result.dataset), metric), (result.dataset, metric))
    return list(columns.values())


def provenance_table(checkpoints: Sequence[Checkpoint]) -> Table | None:
    """What each figure was measured on and with, so that results can be told apart; None where there are none."""
    rows = []
    for checkpoint, result in _measured(checkpoints):
        versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        hashes = (result.weights_sha256, result.content_sha256, result.template_sha256)
        fields = (
            result.dataset,
            f"{result.samples:,}",
            *((sha256 or "")[:12] for sha256 in hashes),
            versions,
            "" if result.wall_time_s is None else f"{result.wall_time_s:.1f} s",
        )
        rows.append(Row(checkpoint.label, tuple(map(Cell, fields)), note=checkpoint.note))
    columns = ("dataset", "samples", "weights sha256", "data sha256", "templates sha256", "versions", "wall time")
    return Table("provenance", "Provenance", "", tuple(map(Column, columns)), tuple(rows)) if rows else None


def metric_label(metric: str) -> str:
    """A short name for a column: `image_retrieval_recall@5` -> `image R@5`."""
    named = {"mean_per_class_recall": "per class", "mean_average_precision": "mAP"}
    if metric in named:
        return named[metric]
    if metric.startswith(BY_RARITY):
        return metric.removeprefix(BY_RARITY).replace("_", " ")
    return metric.replace("_retrieval_recall@", " R@").removeprefix("acc/")


def _measured(checkpoints: Sequence[Checkpoint]) -> list[Measured]:
    return [(checkpoint, result) for checkpoint in checkpoints for result in checkpoint.results]


def _dataset_table(group: Sequence[Measured], number: int) -> Table:
    results = [result for _, result in group]
    metrics = distinct(name for result in results for name in result.metrics)
    same = _same_columns(metrics)
    shown = [metric for metric in metrics if metric not in same]
    equal = [f"{metric_label(mean)} is {metric_label(only)}" for mean, only in same.items()]
    notes = [f"Not shown twice: {', '.join(equal)}."] if equal else []
    if any(result.intervals for result in results):
        notes.append("In brackets: 95 % interval.")
    return Table(
        name=f"set_{number}_{results[0].dataset}",
        title=results[0].dataset,
        subtitle=f"{_TASK_NAMES.get(results[0].task, results[0].task)}, {results[0].samples:,} samples, in percent",
        columns=tuple(Column(metric_label(metric)) for metric in shown),
        rows=tuple(mark_places(_rows(group, shown), len(shown))),
        notes=tuple(notes),
        warning=_why_not_comparable(results),
    )


def _same_columns(metrics: Sequence[str]) -> dict[str, str]:
    """Means over categories of which there is one: `acc/object` is `acc/replace_obj` if that is alone."""
    categories = [one for one in metrics if one.startswith("acc/") and one not in _MEANS]
    same = {}
    for mean, end in _MEANS.items():
        averaged = [category for category in categories if category.endswith(end)]
        if mean in metrics and len(averaged) == 1:
            same[mean] = averaged[0]
    return same


def _why_not_comparable(results: Sequence[Result]) -> str:
    """How the rows of one set were measured differently; empty if they were not."""
    differing: dict[str, set[Any]] = {
        "numbers of samples": {result.samples for result in results},
        "prompt templates": {result.template_sha256 for result in results},
        "images or captions": {result.content_sha256 for result in results} - {None},
    }
    what = [name for name, values in differing.items() if len(values) > 1]
    return f"These rows were measured with different {' and '.join(what)}: they cannot be compared." if what else ""


def _rows(group: Sequence[Measured], metrics: Sequence[str]) -> list[Row]:
    """A row per checkpoint, and the chance row last."""
    rows = [
        Row(
            checkpoint.label,
            tuple(percent(result.metrics.get(metric), format_interval(result, metric)) for metric in metrics),
            checkpoint.note,
        )
        for checkpoint, result in group
    ]
    chance = {metric: value for _, result in reversed(group) for metric, value in result.chance.items()}
    if chance:
        rows.append(Row("chance", tuple(percent(chance.get(metric)) for metric in metrics), kind="chance"))
    return rows


def training_table(runs: Sequence[Run]) -> Table | None:
    """How each run was trained: a column per run; None without runs."""
    if not runs:
        return None
    facts = [_training_facts(run) for run in runs]
    labels = distinct(label for fact in facts for label in fact)
    rows = tuple(Row(label, tuple(Cell(fact.get(label, "")) for fact in facts)) for label in labels)
    damaged = [run for run in runs if run.damaged_lines]
    notes = [f"{run.damaged_lines:,} lines of the log of {run.name} cannot be read." for run in damaged]
    columns = tuple(Column(run.name) for run in runs)
    return Table("training", "Training", "", columns, rows, corner="", notes=tuple(notes))


def _training_facts(run: Run) -> dict[str, str]:
    """What was trained on what, then what came of it, then how."""
    recipe, outcome = _recipe_facts(run.recipe) if run.recipe else {}, _outcome(run)
    return {name: recipe.pop(name) for name in ("model", "masking", "data") if name in recipe} | outcome | recipe


def _recipe_facts(recipe: Recipe) -> dict[str, str]:
    stages = recipe.by_stage()
    recipes = [of_stage for _, of_stage in stages]
    facts = {"model": recipe.model.name, "masking": _by_stage(map(_masking, recipes))}
    if any(map(_data, recipes)):
        facts["data"] = _by_stage(map(_data, recipes))
    if recipe.stages:
        facts["stages"] = "; ".join(str(name) for name, _ in stages)
        facts["images"] = _by_stage(str(_image_size(of_stage)) for of_stage in recipes) + " px"
    facts["batch"] = _by_stage(f"{of_stage.train.global_batch_size:,}" for of_stage in recipes) + " pairs"
    facts["learning rate"] = _by_stage(f"{of_stage.optimizer.lr:g}" for of_stage in recipes)
    facts["weight decay"] = _by_stage(f"{of_stage.optimizer.weight_decay:g}" for of_stage in recipes)
    return facts | {"seed": str(recipe.train.seed)}


def _outcome(run: Run) -> dict[str, str]:
    if not run.steps:
        return {}
    facts = {}
    last = run.steps[-1]
    if losses := run.by_stage()[-1].curve("loss")[1]:
        final = losses[-max(1, len(losses) // 20) :]
        facts["loss, last 5 % of the log"] = f"{statistics.fmean(final):.3f}"
    facts["steps"] = f"{last['step']:,}"
    if "samples_seen" in last:
        facts["samples seen"] = f"{last['samples_seen']:,}"
    if "epoch" in last:
        facts["epochs"] = f"{last['epoch']:.2f}"
    if "wall_time_s" in last:
        facts["wall time"] = format_duration(last["wall_time_s"])
    if cost := run.cost_at(last["step"]):
        facts[device_hours_label([run])] = f"{cost.device_h:.3g} on {run.world_size}"
    for metric, label in (("samples_per_s", "samples/s, median"), ("tokens_per_s", "tokens/s, median")):
        curves = [stage.curve(metric)[1] for stage in run.by_stage()]
        if any(curves):
            facts[label] = _by_stage(f"{statistics.median(values):,.0f}" for values in curves if values)
    return facts


def _by_stage(facts: Iterable[str]) -> str:
    """One fact if all stages share it, else one for each."""
    each = list(facts)
    return each[0] if len(set(each)) == 1 else "; ".join(each)


def _masking(recipe: Recipe) -> str:
    masking = recipe.masking
    if recipe.masks_words:
        return "words"
    return masking.strategy if masking.strategy == "none" else f"{masking.strategy}, {masking.target_mask_ratio:.0%}"


def _data(recipe: Recipe) -> str:
    train = recipe.data.train
    return train if isinstance(train, str) else " + ".join(f"{source.weight:g} × {source.path}" for source in train)


def _image_size(recipe: Recipe) -> int:
    return recipe.model.image_size or config_from_name(recipe.model.name).vision.image_size
