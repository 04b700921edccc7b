"""Charts: accuracy over cost and on shifted images, and training curves."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, PercentFormatter, StrMethodFormatter

from formats.charts import Chart, Theme, add_legend, draw_chart, plain, plain_apart, style_axes
from pipeline.evaluation.sets.known import set_key
from pipeline.reporting.inputs import Checkpoint
from pipeline.reporting.runs import Run, device_hours_label
from pipeline.reporting.tables.overview import headline_columns, metric_label
from pipeline.reporting.tables.paper_tables import entry_figures
from pipeline.reporting.tables.papers import IMAGENET, ROBUSTNESS, Published
from pipeline.reporting.tables.rows import Entry

# One of classification, one of retrieval: more of them say the same.
_COST_METRICS = ("acc1", "image_retrieval_recall@1")
_LOG_FROM_RATIO = 5


class Point(NamedTuple):
    """A place on a chart; what belongs to one `label` has one colour, and published points are hollow."""

    x: float
    y: float
    label: str
    is_published: bool = False


def draw_cost_charts(checkpoints: Sequence[Checkpoint], runs: Sequence[Run], published: Published) -> list[Chart]:
    """For ImageNet, or else the first set of each kind: its first figure over hours of training, a line per run."""
    charts = []
    hours = device_hours_label(runs)
    columns = sorted(headline_columns(checkpoints), key=lambda column: set_key(column[0]) not in IMAGENET)
    for wanted in _COST_METRICS:
        for dataset, metric in columns:
            points = _cost_points(checkpoints, dataset, metric) if metric == wanted else []
            if points and set_key(dataset) in IMAGENET and hours == "GPU-hours":
                points += [Point(cost.gpu_hours, cost.imagenet, cost.system, True) for cost in published.costs]
            if len(points) < 2:
                continue
            charts.append(
                draw_chart(
                    f"cost_{re.sub(r'[^a-z0-9]+', '_', wanted)}",
                    f"{dataset}, {metric_label(metric)}, against cost",
                    f"in percent, over {hours} of training (wall time x ranks)"
                    + ("; hollow: published" if any(point.is_published for point in points) else ""),
                    partial(_paint_points, points, hours, f"{metric_label(metric)}, %", True),
                )
            )
            break
    return charts


def _cost_points(checkpoints: Sequence[Checkpoint], dataset: str, metric: str) -> list[Point]:
    return [
        Point(checkpoint.cost.device_h, 100 * result.metrics[metric], checkpoint.label)
        for checkpoint in checkpoints
        for result in checkpoint.results
        if checkpoint.cost and set_key(result.dataset) == set_key(dataset) and metric in result.metrics
    ]


def draw_robustness(entries: Sequence[Entry], published: Published) -> Chart | None:
    """The mean over the shifted sets against ImageNet; None where no row of ours has both."""
    points = []
    for entry in entries:
        figures = entry_figures(ROBUSTNESS, entry)
        if "ood" in figures:
            points.append(Point(100 * figures["imagenet"].share, 100 * figures["ood"].share, entry.label))
    if not points:
        return None
    if table := published.tables.get(ROBUSTNESS.name):
        for method in table.rows:
            printed = table.figures(method)
            if {"imagenet", "ood"} <= printed.keys():
                points.append(Point(printed["imagenet"], printed["ood"], method, True))
    return draw_chart(
        "robustness",
        "Robustness",
        "mean of IN-V2, -A, -R, -O and Sketch over IN-1K, in percent; hollow: published",
        partial(_paint_points, points, "IN-1K, %", "mean of the shifted sets, %", False),
    )


def _paint_points(points: Sequence[Point], x_label: str, y_label: str, is_cost: bool, axes: Axes, theme: Theme) -> None:
    labels = list(dict.fromkeys(point.label for point in points if not point.is_published))
    for index, (label, shown) in enumerate(zip(labels, plain_apart(labels, 28), strict=True)):
        own = sorted(point for point in points if point.label == label and not point.is_published)
        x, y = [point.x for point in own], [point.y for point in own]
        (line,) = axes.plot(x, y, linewidth=1.6 if is_cost else 0, label=shown, marker=theme.marker(index))
        line.set(color=theme.line(index), linestyle=theme.dashes(index))
    for point in points:
        if point.is_published:
            axes.plot([point.x], [point.y], color=theme.text, marker="o", markerfacecolor="none", linewidth=0)
            axes.annotate(
                plain(point.label, 28),
                (point.x, point.y),
                (5, -3),
                textcoords="offset points",
                fontsize=7,
                color=theme.text,
            )
    every_x = [point.x for point in points]
    if is_cost and min(every_x) > 0 and max(every_x) > _LOG_FROM_RATIO * min(every_x):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(0.12)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    style_axes(axes, theme)
    if len(labels) > 1 or len(labels) < len({point.label for point in points}):
        add_legend(axes, theme)


_MAX_POINTS, _MAX_RUNS = 300, 12


def draw_curves(runs: Sequence[Run]) -> list[Chart]:
    """Losses and realised mask ratio over samples seen; a chart for which no run has figures is left out."""
    charts = [
        ("loss", "Loss", "contrastive loss", False),
        ("mlm_loss", "Masked words", "cross-entropy of masked tokens of captions", False),
        ("mask_ratio", "Realised mask ratio", "share of patches dropped; shaded: spread between images", True),
    ]
    curves = []
    for metric, title, description, is_share in charts:
        shown = [run for run in runs if run.curve(metric)[0]]
        if len(shown) > _MAX_RUNS:
            description += f"; the first {_MAX_RUNS} of {len(shown)} runs"
        if shown:
            curves.append(
                draw_chart(metric, title, description, partial(_paint_runs, shown[:_MAX_RUNS], metric, is_share))
            )
    return curves


def _paint_runs(runs: Sequence[Run], metric: str, is_share: bool, axes: Axes, theme: Theme) -> None:
    for index, (run, label) in enumerate(zip(runs, plain_apart([run.name for run in runs]), strict=True)):
        _draw_run(axes, run, metric, label, index, theme)
    axes.set_xlabel("samples seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if is_share:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    style_axes(axes, theme)
    if len(runs) > 1:
        add_legend(axes, theme)


def _draw_run(axes: Axes, run: Run, metric: str, label: str, index: int, theme: Theme) -> None:
    """A line per stage, with a dotted line between: batches and masks differ, and with them what a loss means."""
    stages = [stage for stage in run.by_stage() if stage.curve(metric)[0]]
    for number, stage in enumerate(stages):
        if number:
            axes.axvline(stage.curve(metric)[0][0], color=theme.text, linewidth=0.8, linestyle=":", alpha=0.6)
        (line,) = _draw_stage(axes, stage, metric, theme.line(index))
        line.set(label="" if number else label, linestyle=theme.dashes(index))


def _draw_stage(axes: Axes, stage: Run, metric: str, colour: str) -> list[Line2D]:
    positions, values = stage.curve(metric)
    x, mean, low, high = _bin(positions, values)
    deviations = stage.curve(f"{metric}_std")[1]
    if len(deviations) == len(values):
        spread = _bin(positions, deviations)[1]
        low = [center - deviation for center, deviation in zip(mean, spread, strict=True)]
        high = [center + deviation for center, deviation in zip(mean, spread, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    return axes.plot(x, mean, color=colour, linewidth=1.6, marker="o" if len(x) == 1 else None)


def _bin(positions: list[float], values: list[float]) -> tuple[list[float], list[float], list[float], list[float]]:
    """At most _MAX_POINTS points: mean position, and mean, least and greatest value of each stretch."""
    width = math.ceil(len(values) / _MAX_POINTS)
    stretches = [slice(start, start + width) for start in range(0, len(values), width)]
    return (
        [math.fsum(positions[s]) / len(positions[s]) for s in stretches],
        [math.fsum(values[s]) / len(values[s]) for s in stretches],
        [min(values[s]) for s in stretches],
        [max(values[s]) for s in stretches],
    )
