"""What became of the urls of a download, as one HTML page that needs no other file."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.figure import Figure

from data_prep.console import progress_bar
from data_prep.pages import data_uri, write_html
from data_prep.web.ledger import MEANING, OK, advice_for, count_outcomes, last_outcomes
from data_prep.web.passes import read_passes, read_statistics
from formats.errors import UserError
from formats.files import read_json_lines
from formats.manifest import PROVENANCE

HOSTS_SHOWN = 15
HOSTS_COUNTED = 200_000  # the rarest are forgotten above this, so that memory is bounded
ELAPSED_S = np.geomspace(0.001, 100, 41)
FILE_BYTES = np.geomspace(1e3, 1e8, 41)
SIDE_PIXELS = np.geomspace(16, 16_384, 41)
COLOUR = "#3b7fc4"
_PARTICULARS = re.compile(r"\b[0-9a-f]{64}\b|\d{4,}")  # hashes and large numbers, which make each message unique


@dataclasses.dataclass
class Summary:
    """What one pass over the ledger gathers; its size does not grow with the number of urls."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    failures_by_host: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    messages: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    elapsed: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(40, np.int64))
    file_bytes: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(40, np.int64))
    shorter_side: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(40, np.int64))


def write_report(directory: Path, page: Path) -> None:
    """Render success table, classes, hosts that fail most, and plots.

    Raises UserError when no download was made in `directory`.
    """
    if not read_passes(directory):
        raise UserError(f"{directory}: no download was made here; start with `data-prep download`")
    summary = _summarise(directory)
    total = max(summary.outcomes.total(), 1)
    content: dict[str, Any] = {
        "name": directory.resolve().name,
        "total": summary.outcomes.total(),
        "success": summary.outcomes[OK] / total,
        "rows": [
            (name, count, count / total, MEANING[name], _examples(summary.messages.get(name)))
            for name, count in summary.outcomes.most_common()
        ],
        "advice": advice_for(summary.outcomes),
        "passes": _passes(directory),
        "hosts": [(*key, count) for key, count in summary.failures_by_host.most_common(HOSTS_SHOWN)],
        "source": read_json_lines(directory / PROVENANCE)[0],
        "plots": [
            ("Images per second", _picture(*_rates(directory), "minutes since the start", "images/s")),
            ("Time of a request", _histogram(summary.elapsed, ELAPSED_S, "seconds")),
            ("Files on the web", _histogram(summary.file_bytes, FILE_BYTES, "bytes")),
            ("Shorter side of the originals", _histogram(summary.shorter_side, SIDE_PIXELS, "pixels")),
        ],
    }
    write_html(page, "download.html.j2", content)
    print(page)


def _summarise(directory: Path) -> Summary:
    summary = Summary(outcomes=count_outcomes(directory))
    columns = ["url", "error_message", "elapsed_s", "bytes", "original_width", "original_height"]
    with progress_bar("report", sum(one.shards for one in read_passes(directory)), "shard") as progress:
        for table in last_outcomes(directory, columns):
            _add_shard(summary, table)
            progress.update()
    return summary


def _add_shard(summary: Summary, table: pa.Table) -> None:
    failed = table.to_pandas()
    failed = failed[(failed["class"] != OK) & (failed["url"] != "")]  # blank: forgotten
    for name, url, message in zip(failed["class"], failed["url"], failed["error_message"], strict=True):
        summary.failures_by_host[_host(url), name] += 1
        summary.messages.setdefault(name, Counter())[_PARTICULARS.sub("…", message)] += 1
    _bound(summary.failures_by_host)
    for counter in summary.messages.values():
        _bound(counter)
    summary.elapsed += _counts(table["elapsed_s"].to_numpy(), ELAPSED_S)
    summary.file_bytes += _counts(table["bytes"].to_numpy(), FILE_BYTES)
    sides = np.minimum(table["original_width"].to_numpy(), table["original_height"].to_numpy())
    summary.shorter_side += _counts(sides, SIDE_PIXELS)


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return "no valid url"


def _bound(counter: Counter[Any]) -> None:
    if len(counter) > HOSTS_COUNTED:
        kept = counter.most_common(HOSTS_COUNTED // 2)
        counter.clear()
        counter.update(dict(kept))


def _counts(values: npt.NDArray[Any], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    values = values.astype(np.float64)
    return np.histogram(np.clip(values[~np.isnan(values)], edges[0], edges[-1]), edges)[0].astype(np.int64)


def _examples(messages: Counter[str] | None) -> str:
    return "; ".join(message for message, _ in messages.most_common(3)) if messages else ""


def _passes(directory: Path) -> list[tuple[str, int, int]]:
    """(what was tried, urls, images had) of each pass."""
    rows = []
    for one in read_passes(directory):
        found = sum(read_statistics(directory, shard).get("successes", 0) for shard in one.numbers)
        rows.append((f"retry of {', '.join(one.classes)}" if one.classes else "download", one.rows, found))
    return rows


def _rates(directory: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Minutes since the start and images/s, from when the shards were made."""
    spans = []
    for one in read_passes(directory):
        found = [read_statistics(directory, shard) for shard in one.numbers]
        spans += [(f["start_time"], f["end_time"], f["count"]) for f in found if f]
    if not spans:
        return [], []
    starts, ends, counts = np.array(spans).T
    edges = np.linspace(starts.min(), ends.max(), 61)
    rates = np.zeros(60)
    for start, end, count in zip(starts, ends, counts, strict=True):
        overlap_s = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, None)
        rates += overlap_s * count / max(end - start, 1e-6)
    width_s = edges[1] - edges[0]
    return list((edges[:-1] + width_s / 2 - edges[0]) / 60), list(rates / width_s)


def _histogram(counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64], unit: str) -> str:
    figure, axes = _axes()
    axes.stairs(counts, edges, fill=True, color=COLOUR)
    axes.set(xscale="log", xlabel=unit, ylabel="urls")
    return _encoded(figure)


def _picture(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> str:
    figure, axes = _axes()
    axes.plot(x, y, color=COLOUR)
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
    return _encoded(figure)


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _encoded(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    return data_uri(stream.getvalue(), "image/svg+xml")
