"""The page of `data-prep clusters`: how large they are, what is in some of them, and what was merged."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from data_prep.balancing.examples import find_examples
from formats.charts import Theme, draw_chart, style_axes
from formats.clusters import Clusters
from formats.files import write_atomically
from formats.pages import render

TEMPLATE = Path(__file__).parents[1] / "templates" / "clusters.html.j2"
SHOWN = 6  # of the largest, of the middle ones, of the smallest, and of those that took in others
_POINTS = 400  # of the chart


def write_page(path: Path, directory: Path, clusters: Clusters, processes: int) -> None:
    """Write the page; pictures and captions are read from the shards in `directory`."""
    by_size = np.argsort(-clusters.sizes_C, kind="stable")
    by_size = by_size[clusters.sizes_C[by_size] > 0].tolist()
    groups = _groups(by_size)
    examples = find_examples(directory, clusters, [number for group in groups.values() for number in group], processes)
    shown = {
        title: [{"size": int(clusters.sizes_C[number]), "number": number, "of": examples[number]} for number in group]
        for title, group in groups.items()
    }
    chart = draw_chart(
        "sizes",
        "Sizes of clusters",
        "samples in a cluster, by its place when the largest comes first; both axes are logarithmic",
        functools.partial(_paint_sizes, clusters.sizes_C[by_size]),
    )
    content = {
        "name": directory.resolve().name,
        "summary": clusters.summary,
        "empty": len(clusters.sizes_C) - len(by_size),
        "groups": {title: group for title, group in shown.items() if group},
        "charts": [chart],
        "merged": _merged(clusters.summary["merged"], clusters.sizes_C),
    }
    write_atomically(path, render(TEMPLATE, content))


def _groups(by_size: Sequence[int]) -> dict[str, Sequence[int]]:
    """Some clusters of each kind, none in two."""
    largest, rest = by_size[:SHOWN], by_size[SHOWN:]
    smallest, rest = rest[-SHOWN:], rest[:-SHOWN]
    first = max(0, (len(rest) - SHOWN) // 2)
    return {"The largest": largest, "In the middle": rest[first : first + SHOWN], "The smallest": smallest}


def _merged(merges: Sequence[Mapping[str, Any]], sizes_C: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """The clusters that took in the most centroids."""
    cosines: dict[int, list[float]] = {}
    for merge in merges:
        cosines.setdefault(merge["into"], []).append(merge["cosine"])
    most = sorted(cosines, key=lambda number: (-len(cosines[number]), number))[:SHOWN]
    return [
        {
            "number": number,
            "size": int(sizes_C[number]),
            "centroids": len(cosines[number]),
            "least": min(cosines[number]),
        }
        for number in most
    ]


def _paint_sizes(sizes_C: npt.NDArray[np.int64], axes: Axes, theme: Theme) -> None:
    places = np.unique(np.geomspace(1, len(sizes_C), _POINTS).astype(int))
    marker = "o" if len(sizes_C) < 50 else ""
    axes.loglog(places, sizes_C[places - 1], color=theme.line(0), marker=marker, markersize=3)
    axes.set_xlabel("place")
    axes.set_ylabel("samples")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    style_axes(axes, theme)
