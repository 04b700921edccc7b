"""Where masks pay, as one picture and one table: kinds of masks by regimes, differences to none at equal time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from doc_tables import markdown
from matplotlib import pyplot
from study_plan import BASELINE

# Differences in points that have the strongest colours.
_STRONGEST = 4.0


def regimes(figures: dict[str, Any]) -> dict[str, Any]:
    """Parts of the record that are cells of the map, with what none reached at equal time: itself."""
    return {
        name: part
        for name, part in figures.items()
        if name.startswith("map_") and BASELINE in part["views"].get("samples", {}) and "time" in part["views"]
    }


def points(part: dict[str, Any], arm: str) -> float | None:
    """Difference to none, in points of the regime's last metric; None where the arm did not run."""
    metric = part["metrics"][-1]
    found = part["views"]["time"].get(arm)
    if found is None:
        return None
    return 100 * float(found[metric]["mean"] - part["views"]["samples"][BASELINE][metric]["mean"])


def arms_of(cells: dict[str, Any]) -> list[str]:
    """All but none, those of many regimes first, as their files have them."""
    arms = dict.fromkeys(arm for part in cells.values() for arm in part["views"]["time"])
    return sorted(arms, key=lambda arm: -sum(arm in part["views"]["time"] for part in cells.values()))


def map_table(figures: dict[str, Any]) -> str:
    """A row for each kind of masks, a column for each regime."""
    cells = regimes(figures)
    rows = []
    none = [f"{100 * part['views']['samples'][BASELINE][part['metrics'][-1]]['mean']:.1f}" for part in cells.values()]
    for arm in arms_of(cells):
        found = [points(part, arm) for part in cells.values()]
        rows.append([arm, *("" if value is None else f"{value:+.1f}" for value in found)])
    header = ["masks", *(f"{part['title']}: {part['metrics'][-1]}" for part in cells.values())]
    return markdown(header, [["none", *none], *rows])


def draw_map(figures: dict[str, Any], path: Path) -> None:
    """The same in colours: blue above none, red below."""
    cells = regimes(figures)
    arms = arms_of(cells)
    figure, axes = pyplot.subplots(figsize=(3.5 + 1.5 * len(cells), 1.8 + 0.34 * len(arms)))
    values = [[points(part, arm) for part in cells.values()] for arm in arms]
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    axes.imshow(shown, cmap="RdBu", vmin=-_STRONGEST, vmax=_STRONGEST, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                colour = "white" if abs(value) > 0.7 * _STRONGEST else "black"
                axes.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=9, color=colour)
    titles = [f"{part['title']}\n{part['metrics'][-1]}".replace(", ", "\n") for part in cells.values()]
    axes.set_xticks(range(len(cells)), titles, fontsize=8)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlabel("points over none, trained for the same time")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
