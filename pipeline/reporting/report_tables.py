"""Tables of results: by data set, the first figures of all sets side by side, and what each was measured with."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.results import Result
from pipeline.evaluation.sets.known import set_key
from pipeline.evaluation.tasks import composition, linear_probe, retrieval, zero_shot
from pipeline.reporting.group_tables import format_interval, group_table
from pipeline.reporting.published import Published
from pipeline.reporting.report_inputs import Run
from pipeline.reporting.result_rows import by_recipe, row_label, row_note
from pipeline.reporting.run_cost import device_hours_label
from pipeline.reporting.table import Cell, Column, Row, Table, distinct, mark_places, percent
from pipeline.reporting.table_groups import Group, Measure

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
