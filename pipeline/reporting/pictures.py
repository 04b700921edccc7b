"""Pictures of results, from features and data sets: retrieval looked at, and which classes are confused.

Few and small, so that a page is. Queries are spread evenly over the set, neither the best nor the worst.

I images, C captions or classes, U distinct captions, D embed_dim, N images of a classification set
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from formats.charts import Chart, Theme, draw_chart, plain_apart
from formats.errors import UserError
from pipeline.evaluation.sets.layouts import ClassificationSet, RetrievalSample, RetrievalSet
from pipeline.evaluation.tasks import retrieval, zero_shot
from pipeline.evaluation.tasks.task import distinct
from pipeline.image_sources import load_image
from pipeline.reporting.inputs import StoredJob, newest_of_each_set
from pipeline.reporting.masks.drawing import jpeg_bytes, to_pillow
from pipeline.reporting.tables.table import Cell, Column, Row, Table

MAX_GALLERIES = 3
_TEXT_QUERIES, _IMAGE_QUERIES, _HITS = 5, 3, 5
_THUMBNAIL_PIXELS = 112
_CAPTION_LETTERS = 160

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ImageHit:
    """An image that was found."""

    jpeg: bytes
    is_right: bool


@dataclass(frozen=True)
class CaptionHit:
    """A caption that was found."""

    caption: str
    is_right: bool


@dataclass(frozen=True)
class TextQuery:
    """A caption, the images nearest to it, and where its own image came."""

    caption: str
    outcome: str
    hits: tuple[ImageHit, ...]


@dataclass(frozen=True)
class ImageQuery:
    """An image and the captions nearest to it."""

    jpeg: bytes
    hits: tuple[CaptionHit, ...]


@dataclass(frozen=True)
class Gallery:
    """Both kinds of queries of one checkpoint on one set."""

    title: str
    subtitle: str
    text_queries: tuple[TextQuery, ...]
    image_queries: tuple[ImageQuery, ...]


def draw_gallery(stored: StoredJob) -> Gallery:
    """Some queries of a retrieval job. Raises UserError if features are missing or an image does not decode."""
    dataset = stored.job.dataset
    assert isinstance(dataset, RetrievalSet)
    features = stored.features(retrieval.TASK)
    captions = [caption for sample in dataset.samples for caption in sample.captions]
    texts, text_C = distinct(captions)
    image_C = torch.arange(len(dataset.samples)).repeat_interleave(
        torch.tensor([len(sample.captions) for sample in dataset.samples])
    )
    images_ID, texts_UD = features["images"], features["captions"]
    return Gallery(
        title=stored.job.dataset_name,
        subtitle=f"{stored.label}; {len(dataset.samples):,} images, {len(captions):,} captions. Queries are spread "
        "evenly over the set; what belongs together is marked.",
        text_queries=tuple(
            _ask_for_images(dataset.samples, captions[c], images_ID @ texts_UD[text_C[c]], int(image_C[c]))
            for c in spread(range(len(captions)), _TEXT_QUERIES)
        ),
        image_queries=tuple(
            _ask_for_captions(dataset.samples[i], texts, texts_UD @ images_ID[i])
            for i in spread(range(len(dataset.samples)), _IMAGE_QUERIES)
        ),
    )


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, from the middles of equally long stretches."""
    count = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def _ask_for_images(samples: Sequence[RetrievalSample], caption: str, scores_I: Tensor, right: int) -> TextQuery:
    nearest = scores_I.argsort(descending=True, stable=True)[:_HITS].tolist()
    rank = 1 + int((scores_I > scores_I[right]).sum())
    return TextQuery(
        _shorten(caption),
        f"its image comes {_ordinal(rank)} of {len(samples):,}",
        tuple(ImageHit(_thumbnail(samples[i]), i == right) for i in nearest),
    )


def _ask_for_captions(sample: RetrievalSample, texts: Sequence[str], scores_U: Tensor) -> ImageQuery:
    nearest = scores_U.argsort(descending=True, stable=True)[:_HITS].tolist()
    hits = tuple(CaptionHit(_shorten(texts[u]), texts[u] in sample.captions) for u in nearest)
    return ImageQuery(_thumbnail(sample), hits)


def _thumbnail(sample: RetrievalSample) -> bytes:
    return jpeg_bytes(to_pillow(load_image(sample.image, _THUMBNAIL_PIXELS)))


def _shorten(caption: str) -> str:
    return caption if len(caption) <= _CAPTION_LETTERS else f"{caption[: _CAPTION_LETTERS - 1]}…"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


MAX_CONFUSIONS = 3
_MAX_CLASSES, _MAX_NUMBERED = 50, 12
_PAIRS = 10
_NAME_LETTERS = 20


@dataclass(frozen=True)
class Confusion:
    """A chart, unless there are too many classes, and the table of the most frequent confusions."""

    chart: Chart | None
    pairs: Table
    is_small: bool


def draw_confusion(stored: StoredJob, number: int) -> Confusion:
    """The confusions of a zero-shot classification job. Raises UserError if features are missing."""
    dataset = stored.job.dataset
    assert isinstance(dataset, ClassificationSet)
    predicted_N = zero_shot.predict(dataset, stored.features(zero_shot.TASK))
    labels_N = torch.tensor([sample.label for sample in dataset.samples])
    counts_CC = count_pairs(labels_N, predicted_N, len(dataset.class_names))
    names = dataset.class_names
    chart = None
    if len(names) <= _MAX_CLASSES:
        side_inches = 2.2 + 0.16 * len(names)
        chart = draw_chart(
            f"confusion_{number}",
            "Confusion matrix",
            "share of each class's images (row) that were taken for a class (column)",
            partial(_paint, counts_CC, names),
            (side_inches, side_inches),
        )
    subtitle = f"{stored.label}; zero-shot, {len(labels_N):,} images of {len(names):,} classes"
    pairs = _pairs_table(counts_CC, names, f"confusions_{number}", stored.job.dataset_name, subtitle)
    return Confusion(chart, pairs, len(names) <= _MAX_NUMBERED)


def count_pairs(labels_N: Tensor, predicted_N: Tensor, num_classes: int) -> Tensor:
    """How many images of each class were taken for each, int64 [C, C], rows the true classes."""
    pair_N = labels_N * num_classes + predicted_N
    return torch.bincount(pair_N, minlength=num_classes**2).view(num_classes, num_classes)


def _pairs_table(counts_CC: Tensor, names: tuple[str, ...], name: str, title: str, subtitle: str) -> Table:
    wrong_CC = counts_CC.clone().fill_diagonal_(0)
    order = wrong_CC.flatten().argsort(descending=True, stable=True)[:_PAIRS].tolist()
    rows = []
    for true, predicted in (divmod(pair, len(names)) for pair in order):
        count = int(wrong_CC[true, predicted])
        if count:
            share = 100 * count / int(counts_CC[true].sum())
            cells = (Cell(f"{count:,}", count), Cell(f"{share:.1f}", share))
            rows.append(Row(f"{names[true]} → {names[predicted]}", cells))
    columns = (Column("images"), Column("% of the class"))
    return Table(name, title, subtitle, columns, tuple(rows), corner="class → taken for")


def _paint(counts_CC: Tensor, names: tuple[str, ...], axes: Axes, theme: Theme) -> None:
    share_CC = counts_CC / counts_CC.sum(dim=1, keepdim=True).clamp_min(1)
    shades = LinearSegmentedColormap.from_list("shades", theme.shades)
    axes.imshow(share_CC.numpy(), cmap=shades, vmin=0, vmax=1)
    ticks, labels = range(len(names)), plain_apart(names, _NAME_LETTERS)
    size = 9 if len(names) <= _MAX_NUMBERED else 7
    axes.set_xticks(ticks, labels, rotation=90, fontsize=size)
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.tick_params(colors=theme.text, length=0)
    axes.set_ylabel("class", color=theme.text)
    axes.set_xlabel("taken for", color=theme.text)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)
    if len(names) <= _MAX_NUMBERED:
        for row in ticks:
            for column in ticks:
                if share := round(100 * share_CC[row, column].item()):
                    # the ink of the other end of the scale
                    ink = theme.shades[0] if share > 50 else theme.text
                    axes.text(column, row, str(share), ha="center", va="center", fontsize=7, color=ink)


@dataclass(frozen=True)
class ResultPictures:
    """Galleries and confusions of the newest checkpoint on each set; notes say what could not be shown."""

    galleries: tuple[Gallery, ...]
    confusions: tuple[Confusion, ...]
    notes: tuple[str, ...]


def draw_result_pictures(jobs: Sequence[StoredJob]) -> ResultPictures:
    """Pictures of what evaluations left: few, and with a note for what cannot be shown."""
    notes: list[str] = []
    galleries: list[Gallery] = []
    confusions: list[Confusion] = []
    for stored in newest_of_each_set(jobs, RetrievalSet, retrieval.TASK):
        if len(galleries) == MAX_GALLERIES:
            notes.append(f"No pictures of {stored.job.dataset_name}: {MAX_GALLERIES} retrieval sets are shown.")
            continue
        try:
            galleries.append(draw_gallery(stored))
        except UserError as error:
            notes.append(f"No pictures of {stored.job.dataset_name}: {error}.")
    for stored in newest_of_each_set(jobs, ClassificationSet, zero_shot.TASK):
        if len(confusions) == MAX_CONFUSIONS:
            notes.append(f"No confusions of {stored.job.dataset_name}: {MAX_CONFUSIONS} sets are shown.")
            continue
        try:
            confusions.append(draw_confusion(stored, len(confusions)))
        except UserError as error:
            notes.append(f"No confusions of {stored.job.dataset_name}: {error}.")
    return ResultPictures(tuple(galleries), tuple(confusions), tuple(notes))
