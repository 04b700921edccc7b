"""Effective robustness: accuracy on a shifted set beyond what accuracy on ImageNet lets one expect.

After Taori et al. 2020 (arXiv 2007.00644): the expectation is a line through baseline models, fitted to the logits of
both accuracies. The baseline here is the published rows of the robustness table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import linear_regression

from pipeline.reporting.group_tables import entry_figures
from pipeline.reporting.published import Published
from pipeline.reporting.result_rows import Entry
from pipeline.reporting.table import Cell, Column, Row, Table, mark_places
from pipeline.reporting.table_groups import ROBUSTNESS

# Two make a line; from three on it is a fit.
_FEWEST_MODELS = 3


def effective_robustness(accuracy: float, shifted: float, baseline: Sequence[tuple[float, float]]) -> float:
    """`shifted` less what the baseline's line says at `accuracy`; shares in (0, 1), the baseline as pairs of them."""
    slope, intercept = linear_regression([_logit(x) for x, _ in baseline], [_logit(y) for _, y in baseline])
    return shifted - 1 / (1 + math.exp(-(slope * _logit(accuracy) + intercept)))


def effective_robustness_table(entries: Sequence[Entry], published: Published) -> Table | None:
    """A row per entry with ImageNet and a shifted set, in percentage points; None if there is none, or no baseline."""
    table = published.tables.get(ROBUSTNESS.name)
    if table is None or len(table.rows) < _FEWEST_MODELS:
        return None
    baseline = [table.figures(method) for method in table.rows]
    imagenet, *shifted = ROBUSTNESS.measures
    rows = []
    for entry in entries:
        figures = entry_figures(ROBUSTNESS, entry)
        if imagenet.key not in figures:
            continue
        cells = []
        for measure in shifted:
            shares = [(row[imagenet.key] / 100, row[measure.key] / 100) for row in baseline]
            cells.append(
                _points(effective_robustness(figures[imagenet.key].share, figures[measure.key].share, shares))
                if measure.key in figures and _is_open(figures[imagenet.key].share)
                else Cell("")
            )
        if any(cell.text for cell in cells):
            rows.append(Row(entry.label, tuple(cells), entry.note))
    if not rows:
        return None
    known = [row[imagenet.key] for row in baseline]
    return Table(
        "effective_robustness",
        "Effective robustness",
        "percentage points above a line through the published rows, at the same accuracy on IN-1K",
        tuple(Column(measure.label) for measure in shifted),
        tuple(mark_places(rows, len(shifted))),
        notes=(f"The line is fitted at {min(known):g} to {max(known):g} % on IN-1K; far from there it says little.",),
    )


def _points(share: float) -> Cell:
    return Cell(f"{100 * share:+.2f}", 100 * share)


def _is_open(share: float) -> bool:
    return 0 < share < 1


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
