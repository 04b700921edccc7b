"""The sheet that mask-preview shows: pictures in rows and columns, with what is to be read about them.

B images, S side of an image in pixels, L patches of an image
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from model.masking import PatchedImages
from pipeline.image_sources import CaptionedImage
from pipeline.reporting.mask_anatomy import Anatomy, Clusters, dissect
from pipeline.reporting.mask_pictures import (
    enlarge,
    grey_dropped,
    heat_map,
    jpeg_bytes,
    outline,
    tint_clusters,
    to_pillow,
)
from pipeline.reporting.preview_setting import PreviewSetting

UNKNOWN = "–"
# Beside the originals: what is kept; also the clusters behind it; also the anchors and similarities behind those.
SHOWS = ("masks", "clusters", "steps")


@dataclass(frozen=True)
class Cell:
    """A picture, what it shows, and a few words under it."""

    label: str
    picture: Image
    note: str

    @property
    def jpeg(self) -> bytes:
        """The picture's file."""
        return jpeg_bytes(self.picture)


@dataclass(frozen=True)
class Row:
    """All pictures of one image, the original first."""

    caption: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Summary:
    """What a strategy did to the batch: figures by name, UNKNOWN where it has none."""

    strategy: str
    figures: Mapping[str, str]

    def __str__(self) -> str:
        known = [f"{name} {figure}" for name, figure in self.figures.items() if figure != UNKNOWN]
        return f"{self.strategy}: {', '.join(known)}"


@dataclass(frozen=True)
class Sheet:
    """Rows with the same columns, the setting above them and the batch's statistics below."""

    title: str
    rows: tuple[Row, ...]
    summaries: tuple[Summary, ...]


def make_sheet(setting: PreviewSetting, samples: Sequence[CaptionedImage], images_BCSS: Tensor, show: str) -> Sheet:
    """Mask uint8 images as one batch and draw each under every strategy, and what led to it as one of SHOWS says."""
    images = PatchedImages(images_BCSS, setting.patch_size)
    anatomies = {
        strategy: dissect(images, masking, setting.seed, setting.guidance)
        for strategy, masking in setting.maskings.items()
    }
    rows = []
    for index, sample in enumerate(samples):
        image_CSS, patch_size = enlarge(images_BCSS[index], setting.patch_size)
        cells = [Cell("original", to_pillow(image_CSS), sample.image.name)]
        for strategy, anatomy in anatomies.items():
            cells += _cluster_cells(strategy, image_CSS, anatomy, index, patch_size, show)
            kept = to_pillow(grey_dropped(image_CSS, anatomy.dropped_BL[index], patch_size))
            cells.append(Cell(strategy, kept, f"{_percent(anatomy.mask_ratio_B[index])} dropped"))
        rows.append(Row(sample.caption, tuple(cells)))
    summaries = tuple(_summarize(strategy, anatomy) for strategy, anatomy in anatomies.items())
    return Sheet(str(setting), tuple(rows), summaries)


def _cluster_cells(
    strategy: str, image_CSS: Tensor, anatomy: Anatomy, index: int, patch_size: int, show: str
) -> Iterator[Cell]:
    clusters = anatomy.clusters
    if clusters is None or show == "masks":
        return
    anchors_A, similarity_L = clusters.anchors_BA[index], clusters.similarity_BL[index]
    name = "anchors" if clusters.edges_BL is None else "candidates"
    if clusters.edges_BL is not None:
        edges = to_pillow(heat_map(image_CSS, clusters.edges_BL[index], 0.5, patch_size))
        yield Cell(f"{strategy}: edges", edges, "blue 0, red 1")
    if show == "steps":
        yield Cell(
            f"{strategy}: {name}", to_pillow(outline(image_CSS, anchors_A, patch_size)), f"{len(anchors_A)} drawn"
        )
        middle = _middle(clusters, anatomy.threshold)
        similarity = to_pillow(heat_map(image_CSS, similarity_L, middle, patch_size))
        yield Cell(f"{strategy}: similarity", similarity, f"blue 0, white {middle:.2f}, red 1")
    tinted_CSS = tint_clusters(image_CSS, clusters.nearest_BL[index], clusters.score_BL[index], patch_size)
    picture = to_pillow(outline(tinted_CSS, anchors_A, patch_size))
    yield Cell(f"{strategy}: clusters", picture, f"of {len(anchors_A)} {name}")


def _middle(clusters: Clusters, threshold: float) -> float:
    """The similarity that is drawn white: the threshold where that is one of similarity, and inside the scale."""
    is_of_similarity = clusters.edges_BL is None and math.isfinite(threshold)
    return min(max(threshold, 0.05), 0.95) if is_of_similarity else 0.5


def _summarize(strategy: str, anatomy: Anatomy) -> Summary:
    ratio_B = anatomy.mask_ratio_B
    # without clusters a threshold is one of random numbers, and says nothing
    threshold = anatomy.threshold if anatomy.clusters else math.nan
    return Summary(
        strategy,
        {
            "dropped": _percent(ratio_B.mean()),
            "spread": _percent(torch.std(ratio_B, correction=0)),
            "threshold": f"{threshold:.3f}" if math.isfinite(threshold) else UNKNOWN,
            "flat patches": UNKNOWN if math.isnan(anatomy.flat_share) else _percent(anatomy.flat_share),
        },
    )


def _percent(share: Tensor | float) -> str:
    return f"{100 * share:.1f} %"
