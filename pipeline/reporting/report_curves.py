"""Training curves: loss and realised mask ratio over samples seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter

from pipeline.reporting.charts import Chart, Theme, add_legend, draw_chart, plain, style_axes
from pipeline.reporting.report_inputs import Run

_MAX_POINTS, _MAX_RUNS = 300, 12


def draw_curves(runs: Sequence[Run]) -> list[Chart]:
    """Loss and realised mask ratio over samples seen; a chart for which no run has figures is left out."""
    charts = [
        ("loss", "Loss", "contrastive loss", False),
        ("mask_ratio", "Realised mask ratio", "share of patches dropped; shaded: spread between images", True),
    ]
    curves = []
    for metric, title, description, is_share in charts:
        shown = [run for run in runs if run.curve(metric)[0]]
        if len(shown) > _MAX_RUNS:
            description += f"; the first {_MAX_RUNS} of {len(shown)} runs"
        if shown:
            curves.append(draw_chart(metric, title, description, partial(_paint, shown[:_MAX_RUNS], metric, is_share)))
    return curves


def _paint(runs: Sequence[Run], metric: str, is_share: bool, axes: Axes, theme: Theme) -> None:
    for index, run in enumerate(runs):
        _draw_run(axes, run, metric, theme.line(index), theme)
    axes.set_xlabel("samples seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if is_share:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    style_axes(axes, theme)
    if len(runs) > 1:
        add_legend(axes, theme)


def _draw_run(axes: Axes, run: Run, metric: str, colour: str, theme: Theme) -> None:
    """A line per stage, with a dotted line between: batches and masks differ, and with them what a loss means."""
    stages = [stage for stage in run.by_stage() if stage.curve(metric)[0]]
    for index, stage in enumerate(stages):
        if index:
            axes.axvline(stage.curve(metric)[0][0], color=theme.text, linewidth=0.8, linestyle=":", alpha=0.6)
        _draw_stage(axes, stage, metric, colour, label=plain(run.name) if index == 0 else "")


def _draw_stage(axes: Axes, stage: Run, metric: str, colour: str, label: str) -> None:
    positions, values = stage.curve(metric)
    x, mean, low, high = _bin(positions, values)
    deviations = stage.curve(f"{metric}_std")[1]
    if len(deviations) == len(values):
        spread = _bin(positions, deviations)[1]
        low = [center - deviation for center, deviation in zip(mean, spread, strict=True)]
        high = [center + deviation for center, deviation in zip(mean, spread, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=1.6, label=label, marker="o" if len(x) == 1 else None)


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
