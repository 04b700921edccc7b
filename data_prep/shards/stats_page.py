"""The page of `data-prep stats`: a table, a histogram of each quantity, the commonest words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from formats.charts import Theme, draw_chart, style_axes
from formats.files import write_atomically
from formats.pages import render

BARS = 50
TEMPLATE = Path(__file__).parents[1] / "templates" / "stats.html.j2"


def write_page(path: Path, name: str, content: Mapping[str, Any], histograms: Mapping[str, Counter[int]]) -> None:
    """Write the page; `content` is that of stats.json, `histograms` are value -> count."""
    charts = [
        draw_chart(label, label.replace("_", " "), "samples by value", partial(_paint, histogram))
        for label, histogram in histograms.items()
    ]
    write_atomically(path, render(TEMPLATE, {"name": name, "stats": content, "charts": charts}))


def _paint(histogram: Counter[int], axes: Axes, theme: Theme) -> None:
    """What lies above the 99th percentile is in the last bar."""
    values_N = np.array(sorted(histogram))
    counts_N = np.array([histogram[value] for value in values_N.tolist()])
    highest = int(values_N[np.searchsorted(np.cumsum(counts_N), 0.99 * counts_N.sum())])
    lowest = int(values_N[0])
    bars = max(1, min(BARS, highest - lowest + 1))
    edges = np.linspace(lowest, highest + 1, bars + 1).tolist()
    axes.hist(np.minimum(values_N, highest), bins=edges, weights=counts_N, color=theme.line(0))
    style_axes(axes, theme)
