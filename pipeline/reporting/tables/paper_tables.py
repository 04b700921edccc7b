"""The tables that papers print, of our results, with the published rows below ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression

from pipeline.evaluation.results import Result
from pipeline.evaluation.sets.known import KNOWN_SETS, set_key
from pipeline.reporting.tables.papers import LAYOUTS, ROBUSTNESS, Measure, PaperLayout, Published
from pipeline.reporting.tables.rows import Entry
from pipeline.reporting.tables.table import Cell, Column, Row, Table, distinct, mark_places, percent


@dataclass(frozen=True)
class Figure:
    """A share in [0, 1] and, small beside it, how sure it is."""

    share: float
    spread: str = ""


def paper_tables(entries: Sequence[Entry], published: Published, cost_label: str) -> list[Table]:
    """The tables of which we have at least one figure; columns of which we have none are left out."""
    tables = (paper_table(layout, entries, published, cost_label) for layout in LAYOUTS)
    return [table for table in tables if table]


def paper_table(layout: PaperLayout, entries: Sequence[Entry], published: Published, cost_label: str) -> Table | None:
    """One table, with the cost as the last column if any is known; None if we have none of its figures.

    cost_label: what to call hours of devices, empty where no run was given
    """
    entries = [entry for entry in entries if entry_figures(layout, entry)]
    figures = [entry_figures(layout, entry) for entry in entries]
    measures = [measure for measure in layout.measures if any(measure.key in found for found in figures)]
    if not measures:
        return None
    means = [mean for mean in layout.means if any(mean.key in found for found in figures)]
    keys = [measure.key for measure in measures] + [mean.key for mean in means]
    columns = [Column(measure.label, measure.heading) for measure in measures] + [Column(mean.label) for mean in means]
    rows = [
        Row(entry.label, tuple(_cell(found.get(key)) for key in keys), entry.note)
        for entry, found in zip(entries, figures, strict=True)
    ]
    if layout.name in published.tables:
        rows += _published_rows(layout, keys, published)
    if chance := _chance(layout, entries):
        rows.append(Row("chance", tuple(percent(chance.get(key)) for key in keys), kind="chance"))
    rows = mark_places(rows, len(keys))
    if any(entry.cost for entry in entries):
        columns.append(Column(cost_label))
        costs = [*map(_hours, entries), *[Cell("")] * (len(rows) - len(entries))]
        rows = [replace(row, cells=(*row.cells, cost)) for row, cost in zip(rows, costs, strict=True)]
    return Table(
        layout.name,
        layout.title,
        layout.subtitle,
        tuple(columns),
        tuple(rows),
        notes=(*_notes(layout, figures, published), *_what_spreads_are(rows), *_without_cost(entries, cost_label)),
        warning=" ".join(_warnings(layout, entries, layout.name in published.tables)),
    )


def entry_figures(layout: PaperLayout, entry: Entry) -> dict[str, Figure]:
    """An entry's figures and means by key; where it has several seeds, those that all of them have."""
    by_seed = [_figures_of_seed(layout, seed.results) for seed in entry.seeds]
    if len(by_seed) == 1:
        return by_seed[0]
    figures = {}
    for key in by_seed[0]:
        values = [found[key].share for found in by_seed if key in found]
        if len(values) == len(by_seed):
            figures[key] = Figure(statistics.fmean(values), f"± {100 * statistics.stdev(values):.2f}")
    return figures


def _figures_of_seed(layout: PaperLayout, results: Sequence[Result]) -> dict[str, Figure]:
    """One checkpoint's figures by key, and the means of which all figures are there."""
    figures = {}
    for measure in layout.measures:
        if found := find_results(measure, results):
            figures[measure.key] = Figure(found[0].metrics[measure.metric], format_interval(found[0], measure.metric))
    for mean in layout.means:
        if all(key in figures for key in mean.of):
            figures[mean.key] = Figure(statistics.fmean(figures[key].share for key in mean.of))
    return figures


def format_interval(result: Result, metric: str) -> str:
    """The 95 % interval of a figure in percent, nothing if the result has none."""
    match result.intervals.get(metric):
        case [low, high]:
            return f"[{100 * low:.1f}, {100 * high:.1f}]"
    return ""


def find_results(measure: Measure, results: Sequence[Result]) -> list[Result]:
    """The results that have a figure: normally one or none."""
    return [
        result for result in results if set_key(result.dataset) in measure.sets and measure.metric in result.metrics
    ]


def _published_rows(layout: PaperLayout, keys: Sequence[str], published: Published) -> list[Row]:
    table = published.tables[layout.name]
    rows = []
    for method in table.rows:
        figures = table.figures(method)
        cells = [Cell(f"{figures[key]:.1f}", figures[key]) if key in figures else Cell("") for key in keys]
        time = published.methods.get(method)
        note = "published" if time is None else f"published, {time:g} × CLIP's training time"
        rows.append(Row(method, tuple(cells), note, "published"))
    return rows


def _chance(layout: PaperLayout, entries: Sequence[Entry]) -> dict[str, float]:
    """Chance by key, and of the means."""
    results = [result for entry in entries for seed in entry.seeds for result in seed.results]
    shares = {}
    for measure in layout.measures:
        for result in find_results(measure, results)[:1]:
            if measure.metric in result.chance:
                shares[measure.key] = result.chance[measure.metric]
    for mean in layout.means:
        if all(key in shares for key in mean.of):
            shares[mean.key] = statistics.fmean(shares[key] for key in mean.of)
    return shares


def _notes(layout: PaperLayout, figures: Sequence[dict[str, Figure]], published: Published) -> tuple[str, ...]:
    notes = []
    labels = {measure.key: measure.label for measure in layout.measures}
    for mean in layout.means:
        if not any(mean.key in found for found in figures):
            missing = [labels[key] for key in mean.of if not any(key in found for found in figures)]
            what = f"missing: {', '.join(missing)}" if missing else "no row has all of them"
            notes.append(f"The {mean.label} of {len(mean.of)} sets is left out ({what}).")
    table = published.tables.get(layout.name)
    if source := table and (table.source or published.source):
        notes.append(f"Published rows, not measured by us: {source}.")
    return tuple(notes)


def _without_cost(entries: Sequence[Entry], cost_label: str) -> list[str]:
    """Whose cost is unknown, if costs were to be had, which a label says."""
    labels = distinct(entry.label for entry in entries if entry.cost is None) if cost_label else []
    why = "no run given wrote those weights, or its log does not say how long it took"
    return [f"No {cost_label} of {', '.join(labels)}: {why}."] if labels else []


def _what_spreads_are(rows: Sequence[Row]) -> list[str]:
    spreads = "".join(cell.spread for row in rows for cell in row.cells)
    meanings = {"±": "± standard deviation over seeds.", "[": "In brackets: 95 % interval."}
    return [" ".join(meanings[sign] for sign in meanings if sign in spreads)] if spreads else []


def _warnings(layout: PaperLayout, entries: Sequence[Entry], beside_published: bool) -> list[str]:
    """Figures that are not what the column's name says: two sets for one column, or a part of a set."""
    found, parts = [], []
    for entry in entries:
        for measure in layout.measures:
            results = find_results(measure, entry.seeds[0].results)
            if len(results) > 1:
                names = " and ".join(result.dataset for result in results)
                found.append(f"{entry.label} has results of {names}, which are the same set: the first is shown.")
            size = next((KNOWN_SETS[name].samples for name in measure.sets if name in KNOWN_SETS), None)
            if beside_published and results and size and results[0].samples != size:
                parts.append(f"{results[0].dataset} ({results[0].samples:,}, not {size:,})")
    if parts:
        sets = ", ".join(distinct(parts))
        found.append(f"Another number of samples than in the papers, so figures cannot be compared: {sets}.")
    return distinct(found)


def _cell(figure: Figure | None) -> Cell:
    return Cell("") if figure is None else percent(figure.share, figure.spread)


def _hours(entry: Entry) -> Cell:
    if entry.cost is None:
        return Cell("")
    hours = entry.cost.device_h
    return Cell(f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}", hours)


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
    imagenet, *shifted = ROBUSTNESS.measures
    baseline = [table.figures(method) for method in table.rows]
    rows = []
    for entry in entries:
        figures = entry_figures(ROBUSTNESS, entry)
        if imagenet.key not in figures:
            continue
        cells = []
        for measure in shifted:
            pairs = [(row.get(imagenet.key, 0) / 100, row.get(measure.key, 0) / 100) for row in baseline]
            line = [(x, y) for x, y in pairs if _is_open(x) and _is_open(y)]
            has_line = len({x for x, _ in line}) >= _FEWEST_MODELS
            cells.append(
                _points(effective_robustness(figures[imagenet.key].share, figures[measure.key].share, line))
                if has_line and measure.key in figures and _is_open(figures[imagenet.key].share)
                else Cell("")
            )
        if any(cell.text for cell in cells):
            rows.append(Row(entry.label, tuple(cells), entry.note))
    if not rows:
        return None
    known = [row[imagenet.key] for row in baseline if imagenet.key in row]
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
