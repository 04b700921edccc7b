"""The report's own tables: first figures side by side, all by data set, provenance, and how runs were trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from model.config import config_from_name
from pipeline.evaluation.results import Result
from pipeline.evaluation.sets.known import set_key
from pipeline.evaluation.tasks import composition, linear_probe, retrieval, zero_shot
from pipeline.recipe import Recipe
from pipeline.reporting.inputs import Run, cost_at, device_hours_label
from pipeline.reporting.tables.paper_tables import format_interval, group_table
from pipeline.reporting.tables.papers import Group, Measure, Published
from pipeline.reporting.tables.rows import by_recipe, row_label, row_note
from pipeline.reporting.tables.table import Cell, Column, Row, Table, distinct, mark_places, percent
from pipeline.training.observing.run_logger import format_duration

_TASK_NAMES = {
    zero_shot.TASK.name: "zero-shot classification",
    retrieval.TASK.name: "image-text retrieval",
    composition.TASK.name: "composition",
    linear_probe.TASK.name: "linear probe",
    linear_probe.FEW_SHOT_TASK.name: "linear probe on few images",
}
HEADLINES = ("acc1", "mean_average_precision", "image_retrieval_recall@1", "text_retrieval_recall@1", "acc")


def dataset_tables(results: Sequence[Result]) -> list[Table]:
    """One table per dataset and task: a row per checkpoint, a column per metric."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dataset, result.task), []).append(result)
    return [_dataset_table(group, number) for number, group in enumerate(groups.values())]


def headline_table(results: Sequence[Result], runs: Sequence[Run] = ()) -> Table | None:
    """The first figure of every dataset side by side, and the cost; None where there is one dataset only."""
    columns = headline_columns(results)
    if len({dataset for dataset, _ in columns}) < 2:
        return None
    group = Group(
        "benchmarks",
        "Benchmarks",
        "The first figures of each dataset, in percent; of several the best is bold, the second underlined.",
        tuple(
            Measure(f"{dataset} {metric}", metric_label(metric), (set_key(dataset),), metric, heading=dataset)
            for dataset, metric in columns
        ),
    )
    return group_table(group, by_recipe(results, runs), Published(), device_hours_label(runs))


def headline_columns(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The first figures of each dataset: (dataset, metric)."""
    return distinct((result.dataset, metric) for result in results for metric in HEADLINES if metric in result.metrics)


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
        rows.append(Row(row_label(result), tuple(map(Cell, fields)), note=row_note(result)))
    columns = ("dataset", "samples", "weights sha256", "templates sha256", "versions", "wall time")
    return Table("provenance", "Provenance", "", tuple(map(Column, columns)), tuple(rows))


def metric_label(metric: str) -> str:
    """A short name for a column: `image_retrieval_recall@5` -> `image R@5`."""
    named = {"mean_per_class_recall": "per class", "mean_average_precision": "mAP"}
    if metric in named:
        return named[metric]
    return metric.replace("_retrieval_recall@", " R@").removeprefix("acc/")


def _dataset_table(group: Sequence[Result], number: int) -> Table:
    first = group[0]
    counts = distinct(result.samples for result in group)
    templates = distinct(result.template_sha256 for result in group)
    warning = ""
    if len(counts) > 1 or len(templates) > 1:
        differing = "numbers of samples" if len(counts) > 1 else "prompt templates"
        warning = f"These rows were measured with different {differing}: they cannot be compared."
    metrics = distinct(name for result in group for name in result.metrics)
    return Table(
        name=f"set_{number}_{first.dataset}",
        title=first.dataset,
        subtitle=f"{_TASK_NAMES.get(first.task, first.task)}, {counts[0]:,} samples, in percent",
        columns=tuple(Column(metric_label(metric)) for metric in metrics),
        rows=tuple(mark_places(_rows(group, metrics), len(metrics))),
        notes=("In brackets: 95 % interval.",) if any(result.intervals for result in group) else (),
        warning=warning,
    )


def _rows(group: Sequence[Result], metrics: Sequence[str]) -> list[Row]:
    """A row per checkpoint, and the chance row last."""
    rows = [
        Row(
            row_label(result),
            tuple(percent(result.metrics.get(metric), format_interval(result, metric)) for metric in metrics),
            row_note(result),
        )
        for result in group
    ]
    chance = {metric: value for result in reversed(group) for metric, value in result.chance.items()}
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
    return Table("training", "Training", "", tuple(Column(run.name) for run in runs), rows, corner="")


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
        if cost := cost_at(run, last["step"]):
            facts[device_hours_label([run])] = f"{cost.device_h:.3g} on {run.world_size}"
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
