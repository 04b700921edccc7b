"""Charts of results: accuracy against what the training cost, and accuracy on shifted images against ImageNet's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from pipeline.evaluation.results import Result
from pipeline.evaluation.sets.known import set_key
from pipeline.reporting.charts import Chart, Theme, add_legend, draw_chart, plain, style_axes
from pipeline.reporting.group_tables import entry_figures
from pipeline.reporting.published import Published
from pipeline.reporting.report_inputs import Run
from pipeline.reporting.report_tables import headline_columns, metric_label
from pipeline.reporting.result_rows import Entry, row_label
from pipeline.reporting.run_cost import cost_of, device_hours_label
from pipeline.reporting.table_groups import IMAGENET, ROBUSTNESS

# One of classification, one of retrieval: more of them say the same.
_COST_METRICS = ("acc1", "image_retrieval_recall@1")
_LOG_FROM_RATIO = 5


class Point(NamedTuple):
    """A place on a chart; what belongs to one `label` has one colour, and published points are hollow."""

    x: float
    y: float
    label: str
    is_published: bool = False


def draw_cost_charts(results: Sequence[Result], runs: Sequence[Run], published: Published) -> list[Chart]:
    """For ImageNet, or else the first set of each kind: its first figure over hours of training, a line per run."""
    charts = []
    hours = device_hours_label(runs)
    columns = sorted(headline_columns(results), key=lambda column: set_key(column[0]) not in IMAGENET)
    for wanted in _COST_METRICS:
        for dataset, metric in columns:
            points = _cost_points(results, runs, dataset, metric) if metric == wanted else []
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
                    partial(_paint, points, hours, f"{metric_label(metric)}, %", True),
                )
            )
            break
    return charts


def _cost_points(results: Sequence[Result], runs: Sequence[Run], dataset: str, metric: str) -> list[Point]:
    points = []
    for result in results:
        cost = cost_of(result, runs)
        if result.dataset == dataset and metric in result.metrics and cost:
            points.append(Point(cost.device_h, 100 * result.metrics[metric], row_label(result)))
    return points


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
            figures_of = table.figures(method)
            points.append(Point(figures_of["imagenet"], figures_of["ood"], method, True))
    return draw_chart(
        "robustness",
        "Robustness",
        "mean of IN-V2, -A, -R, -O and Sketch over IN-1K, in percent; hollow: published",
        partial(_paint, points, "IN-1K, %", "mean of the shifted sets, %", False),
    )


def _paint(points: Sequence[Point], x_label: str, y_label: str, is_cost: bool, axes: Axes, theme: Theme) -> None:
    labels = list(dict.fromkeys(point.label for point in points if not point.is_published))
    for index, label in enumerate(labels):
        own = sorted(point for point in points if point.label == label and not point.is_published)
        x, y = [point.x for point in own], [point.y for point in own]
        axes.plot(x, y, color=theme.line(index), marker="o", linewidth=1.6 if is_cost else 0, label=plain(label, 28))
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
