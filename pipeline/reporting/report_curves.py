"""Training curves as SVG, in colours for light and for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from pipeline.reporting.report_inputs import Run

_MAX_POINTS = 300
_WIDTH_INCHES, _HEIGHT_INCHES = 4.6, 2.9


@dataclass(frozen=True)
class Theme:
    """Colours of a page that a curve must be readable on; the background is the page's own."""

    text: str
    grid: str
    lines: tuple[str, ...]


# Okabe and Ito's colours, which people with any colour vision can tell apart, lightened for dark pages.
LIGHT = Theme("#3d4450", "#d9dde3", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9"))
DARK = Theme("#b8c0cc", "#39414d", ("#6cb8f0", "#ff9b57", "#4fd3a8", "#ef9fcb", "#e6c84f", "#9fd8ff"))


@dataclass(frozen=True)
class Curve:
    """One chart, as SVG for both kinds of page, and its description for those who do not see it."""

    name: str
    title: str
    description: str
    light_svg: bytes
    dark_svg: bytes


def draw_curves(runs: Sequence[Run]) -> list[Curve]:
    """Loss and realised mask ratio over samples seen; a chart for which no run has figures is left out."""
    charts = [
        ("loss", "Loss", "contrastive loss", False),
        ("mask_ratio", "Realised mask ratio", "share of patches dropped; shaded: spread between images", True),
    ]
    curves = []
    for metric, title, description, is_share in charts:
        shown = [run for run in runs if run.curve(metric)[0]]
        if shown:
            light, dark = (_draw(shown, metric, is_share, theme) for theme in (LIGHT, DARK))
            curves.append(Curve(metric, title, description, light, dark))
    return curves


def _draw(runs: Sequence[Run], metric: str, is_share: bool, theme: Theme) -> bytes:
    # an own Figure and canvas: nothing of matplotlib's global state is read or changed but for this block
    with matplotlib.rc_context({"svg.hashsalt": metric, "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained", facecolor="none")
        canvas = FigureCanvasSVG(figure)
        axes = figure.subplots()
        for index, run in enumerate(runs):
            _draw_run(axes, run, metric, theme.lines[index % len(theme.lines)], theme)
        _style(axes, theme, is_share)
        if len(runs) > 1:
            axes.legend(frameon=False, labelcolor=theme.text, fontsize=9)
        stream = io.BytesIO()
        canvas.print_figure(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _draw_run(axes: Axes, run: Run, metric: str, colour: str, theme: Theme) -> None:
    """A line per stage, with a dotted line between: batches and masks differ, and with them what a loss means."""
    stages = [stage for stage in run.by_stage() if stage.curve(metric)[0]]
    for index, stage in enumerate(stages):
        if index:
            axes.axvline(stage.curve(metric)[0][0], color=theme.text, linewidth=0.8, linestyle=":", alpha=0.6)
        _draw_stage(axes, stage, metric, colour, label=run.name if index == 0 else "")


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


def _style(axes: Axes, theme: Theme, is_share: bool) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel("samples seen", color=theme.text)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if is_share:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(colors=theme.text, length=0)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)


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
