"""Which classes a checkpoint takes for which: a matrix where there are few classes, else the most frequent confusions.

N images, C classes
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from pipeline.evaluation.sets.layouts import ClassificationSet
from pipeline.evaluation.tasks import zero_shot
from pipeline.reporting.charts import Chart, Theme, draw_chart, plain
from pipeline.reporting.stored_features import StoredJob
from pipeline.reporting.table import Cell, Column, Row, Table

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
    ticks, labels = range(len(names)), [plain(name, _NAME_LETTERS) for name in names]
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
