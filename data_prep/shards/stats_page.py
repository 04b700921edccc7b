"""The page of `data-prep stats`: a table, a histogram of each quantity, the commonest words."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_prep.pages import data_uri, write_html

BARS = 50


def write_page(path: Path, name: str, content: Mapping[str, Any], histograms: Mapping[str, Counter[int]]) -> None:
    """Write the page; `content` is that of stats.json, `histograms` are value -> count."""
    plots = {label: data_uri(_plot(label, histogram), "image/png") for label, histogram in histograms.items()}
    write_html(path, "stats.html.j2", {"name": name, "stats": content, "plots": plots})


def _plot(label: str, histogram: Counter[int]) -> bytes:
    """A PNG; what lies above the 99th percentile is in the last bar."""
    values_N = np.array(sorted(histogram))
    counts_N = np.array([histogram[value] for value in values_N.tolist()])
    highest = int(values_N[np.searchsorted(np.cumsum(counts_N), 0.99 * counts_N.sum())])
    lowest = int(values_N[0])
    bars = max(1, min(BARS, highest - lowest + 1))
    edges = np.linspace(lowest, highest + 1, bars + 1).tolist()
    figure = Figure(figsize=(4, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.hist(np.minimum(values_N, highest), bins=edges, weights=counts_N)
    axes.set_xlabel(label.replace("_", " "))
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
