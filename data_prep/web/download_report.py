"""What became of the urls of a download, as one HTML page that needs no other file."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes

from data_prep.console import progress_bar
from data_prep.web.ledger import MEANING, OK, advice_for, count_outcomes, last_outcomes
from data_prep.web.passes import read_passes, read_statistics
from formats.charts import Chart, Theme, draw_chart, style_axes
from formats.errors import UserError
from formats.files import read_json_lines, write_atomically
from formats.manifest import PROVENANCE
from formats.pages import render

HOSTS_SHOWN = 15
HOSTS_COUNTED = 200_000  # the rarest are forgotten above this, so that memory is bounded
ELAPSED_S = np.geomspace(0.001, 100, 41)
FILE_BYTES = np.geomspace(1e3, 1e8, 41)
SIDE_PIXELS = np.geomspace(16, 16_384, 41)
TEMPLATE = Path(__file__).parents[1] / "templates" / "download.html.j2"
# What --resize-mode did to the pictures; {} is --image-size.
SIZES = {
    "no": "The size of the pictures is that of the originals.",
    "keep_ratio": "The shorter side of a picture is at most {} pixels.",
    "keep_ratio_largest": "The longer side of a picture is at most {} pixels.",
    "center_crop": "Pictures are the middle squares, of at most {0} x {0} pixels.",
    "border": "Pictures are {0} x {0} pixels, with a border where they were smaller or no squares.",
}
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
    source = read_json_lines(directory / PROVENANCE)[0]
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
        "source": source,
        "size": SIZES.get(source["resize_mode"], source["resize_mode"]).format(source["image_size"]),
        "charts": [
            draw_chart(
                "rate", "Images per second", "over minutes since the start", partial(_curve, *_rates(directory))
            ),
            _histogram("elapsed", "Time of a request", "urls by seconds", summary.elapsed, ELAPSED_S),
            _histogram("bytes", "Files on the web", "urls by bytes", summary.file_bytes, FILE_BYTES),
            _histogram("side", "Shorter side of the originals", "urls by pixels", summary.shorter_side, SIDE_PIXELS),
        ],
    }
    write_atomically(page, render(TEMPLATE, content))
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
    has_failed = pc.and_(pc.not_equal(table["class"], OK), pc.not_equal(table["url"], ""))  # blank: forgotten
    failed = table.filter(has_failed).select(["class", "url", "error_message"])
    for name, url, message in zip(*(column.to_pylist() for column in failed.columns), strict=True):
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


def _histogram(
    name: str, title: str, description: str, counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]
) -> Chart:
    def paint(axes: Axes, theme: Theme) -> None:
        axes.stairs(counts, edges, fill=True, color=theme.line(0))
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        style_axes(axes, theme)

    return draw_chart(name, title, description, paint)


def _curve(x: Sequence[float], y: Sequence[float], axes: Axes, theme: Theme) -> None:
    axes.plot(x, y, color=theme.line(0))
    axes.set_ylim(0, 1.05 * max(y, default=1))
    style_axes(axes, theme)
