"""What a shard directory holds: distributions of caption lengths, picture sizes and tokens, and the commonest words."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from matplotlib.axes import Axes

from data_prep.console import print_table, progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import reading
from data_prep.shards.words import WordCounts, words_of
from formats.charts import Theme, draw_chart, style_axes
from formats.errors import UserError
from formats.files import make_folder, write_atomically, write_json
from formats.manifest import Shard, read_manifest, usable_samples
from formats.pages import render
from formats.pictures import read_header
from formats.tar import IMAGE_TYPES

FORMAT_VERSION = 1
LARGEST = 20_000  # larger values are counted as this one, so that memory has a bound
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
TOP_WORDS = 100

_BARS = 50
_TEMPLATE = Path(__file__).parents[1] / "templates" / "stats.html.j2"

Histogram = Counter[int]


@dataclasses.dataclass
class Distributions:
    """Value -> how often, for each of the quantities."""

    caption_characters: Histogram = dataclasses.field(default_factory=Histogram)
    caption_words: Histogram = dataclasses.field(default_factory=Histogram)
    caption_tokens: Histogram = dataclasses.field(default_factory=Histogram)  # begin and end not counted
    image_width: Histogram = dataclasses.field(default_factory=Histogram)
    image_height: Histogram = dataclasses.field(default_factory=Histogram)
    image_kilobytes: Histogram = dataclasses.field(default_factory=Histogram)
    aspect_percent: Histogram = dataclasses.field(default_factory=Histogram)  # 100 x width / height

    def add(self, other: Distributions) -> None:
        """Add the counts of another part of the data."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).update(getattr(other, field.name))

    def as_dict(self) -> dict[str, Histogram]:
        """The quantities of which anything was counted."""
        every = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: histogram for name, histogram in every.items() if histogram}


def stats(directory: Path, output: Path, tokenizer: Path | None, processes: int) -> dict[str, Any]:
    """Write stats.json and stats.html, a page that needs no other file, of the usable samples of a directory.

    With a SentencePiece model the captions' tokens are counted too. Returns the content of stats.json.

    Raises UserError for a directory that is not verified or changed since, or a model that cannot be read.
    """
    if tokenizer is not None:
        _load_tokenizer(tokenizer)  # says at once what is wrong with it
    distributions = Distributions()
    with reading(directory), tempfile.TemporaryDirectory(prefix=".words.", dir=make_folder(output)) as scratch:
        words = WordCounts(Path(scratch))
        lines = read_manifest(directory).shards
        measure = functools.partial(_measure, directory, tokenizer)
        with progress_bar("stats", sum(line.size_bytes for line in lines), "B") as progress:
            for size_bytes, of_shard, words_of_shard in map_in_processes(measure, lines, processes, limit=len(lines)):
                distributions.add(of_shard)
                words.add(words_of_shard)
                progress.update(size_bytes)
        top = heapq.nlargest(TOP_WORDS, words, key=lambda entry: (entry[1], entry[0]))
    histograms = distributions.as_dict()
    content = {
        "format_version": FORMAT_VERSION,
        "samples": sum(line.samples for line in lines),
        "shards": len(lines),
        "bytes": sum(line.size_bytes for line in lines),
        "distributions": {name: _describe(histogram) for name, histogram in histograms.items()},
        "top_words": dict(top),
    }
    write_json(output / "stats.json", content)
    _write_page(output / "stats.html", directory.resolve().name, content, histograms)
    _print(content)
    print(output / "stats.html")
    return content


def _measure(directory: Path, tokenizer: Path | None, line: Shard) -> tuple[int, Distributions, Counter[str]]:
    counts, words = Distributions(), Counter[str]()
    processor = _load_tokenizer(tokenizer) if tokenizer is not None else None
    for sample in usable_samples(directory, line):
        caption = sample.members["txt"].decode("utf-8", "replace").strip()
        words_of_caption = words_of(caption)
        words.update(words_of_caption)
        counts.caption_characters[min(len(caption), LARGEST)] += 1
        counts.caption_words[min(len(words_of_caption), LARGEST)] += 1
        if processor is not None:
            counts.caption_tokens[min(len(processor.encode(caption)), LARGEST)] += 1
        image = next(content for kind, content in sample.members.items() if kind in IMAGE_TYPES)
        width, height = read_header(image).upright_size
        counts.image_width[width] += 1
        counts.image_height[height] += 1
        counts.image_kilobytes[min(round(len(image) / 1000), LARGEST)] += 1
        counts.aspect_percent[min(round(100 * width / height), LARGEST)] += 1
    return line.size_bytes, counts, words


@functools.cache
def _load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a SentencePiece model: make one with `data-prep tokenizer`") from error


def _describe(histogram: Histogram) -> dict[str, Any]:
    """Mean, extremes and percentiles (the least value that so many percent do not exceed)."""
    total = histogram.total()
    ordered = sorted(histogram.items())
    percentiles: dict[str, int] = {}
    seen = 0
    for value, count in ordered:
        seen += count
        for percentile in PERCENTILES:
            if str(percentile) not in percentiles and 100 * seen >= percentile * total:
                percentiles[str(percentile)] = value
    return {
        "mean": round(sum(value * count for value, count in ordered) / total, 3),
        "min": ordered[0][0],
        "max": ordered[-1][0],
        "percentiles": percentiles,
    }


def _print(content: Mapping[str, Any]) -> None:
    rows = [
        (name, f"{of['mean']:,.1f}", *(f"{of['percentiles'][key]:,}" for key in ("5", "50", "95")), f"{of['max']:,}")
        for name, of in content["distributions"].items()
    ]
    print(f"{content['samples']:,} samples in {content['shards']:,} shards, {content['bytes'] / 1e6:,.1f} MB")
    print_table(("", "mean", "5 %", "median", "95 %", "max"), rows)


def _write_page(path: Path, name: str, content: Mapping[str, Any], histograms: Mapping[str, Histogram]) -> None:
    """Write the page; `content` is that of stats.json, `histograms` are value -> count."""
    charts = [
        draw_chart(label, label.replace("_", " "), "samples by value", functools.partial(_paint, histogram))
        for label, histogram in histograms.items()
    ]
    write_atomically(path, render(_TEMPLATE, {"name": name, "stats": content, "charts": charts}))


def _paint(histogram: Histogram, axes: Axes, theme: Theme) -> None:
    """What lies above the 99th percentile is in the last bar."""
    values_N = np.array(sorted(histogram))
    counts_N = np.array([histogram[value] for value in values_N.tolist()])
    highest = int(values_N[np.searchsorted(np.cumsum(counts_N), 0.99 * counts_N.sum())])
    lowest = int(values_N[0])
    bars = max(1, min(_BARS, highest - lowest + 1))
    edges = np.linspace(lowest, highest + 1, bars + 1).tolist()
    axes.hist(np.minimum(values_N, highest), bins=edges, weights=counts_N, color=theme.line(0))
    style_axes(axes, theme)
