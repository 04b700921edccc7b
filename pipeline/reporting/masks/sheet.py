"""The sheet that mask-preview shows: pictures in rows and columns, with what is to be read about them.

B images, S side of an image in pixels, L patches of an image
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from formats.errors import UserError
from model.masking import PatchedImages
from pipeline.image_sources import CaptionedImage, load_image, read_images
from pipeline.reporting.masks.anatomy import Anatomy, Clusters, dissect
from pipeline.reporting.masks.drawing import (
    enlarge,
    grey_dropped,
    heat_map,
    jpeg_bytes,
    outline,
    tint_clusters,
    to_pillow,
)
from pipeline.reporting.masks.setting import PreviewSetting

UNKNOWN = "–"
# Beside the originals: what is kept; also the clusters behind it; also the anchors and similarities behind those.
SHOWS = ("masks", "clusters", "steps")


@dataclass(frozen=True)
class Cell:
    """A picture, what it shows, and a few words under it."""

    label: str
    picture: Image.Image
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
    """Rows with the same columns, the setting and what is drawn how above them, the batch's statistics below."""

    title: str
    rows: tuple[Row, ...]
    legend: tuple[Cell, ...]
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
    return Sheet(str(setting), tuple(rows), tuple(_legend(anatomies.values(), show)), summaries)


def load_images(source: Path, count: int, image_size: int) -> tuple[list[CaptionedImage], Tensor]:
    """Images of a source that can be used, uint8 [B, 3, S, S]; the others are named. UserError if none is left."""
    samples, images = [], []
    for sample in read_images(source, count):
        try:
            images.append(load_image(sample.image, image_size))
            samples.append(sample)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
    if not images:
        raise UserError(f"none of the images chosen from {source} can be used: give another source, or more --images")
    return samples, torch.stack(images)


def _legend(anatomies: Iterable[Anatomy], show: str) -> Iterator[Cell]:
    """What the drawings mean that this sheet has, each with a sample of four patches."""
    side = 16
    plain_CSS = torch.full((3, 2 * side, 2 * side), 150, dtype=torch.uint8)
    four_L = torch.arange(4)
    clusters = [anatomy.clusters for anatomy in anatomies if anatomy.clusters and show != "masks"]
    yield Cell(
        "grey with lines",
        to_pillow(grey_dropped(plain_CSS, torch.ones(4, dtype=torch.bool), side)),
        "a dropped patch, which the model does not see",
    )
    if clusters:
        yield Cell(
            "colours",
            to_pillow(tint_clusters(plain_CSS, four_L, torch.tensor([1.0, 1.0, 0.6, 0.3]), side)),
            "patches that are most like the same anchor; the stronger, the more alike, and the sooner dropped",
        )
        yield Cell(
            "frame",
            to_pillow(outline(plain_CSS, torch.tensor([0]), side)),
            "an anchor, the patch that a cluster grows from (pgs calls it a candidate)",
        )
    if (show == "steps" and clusters) or any(one.edges_BL is not None for one in clusters):
        yield Cell(
            "blue to red",
            to_pillow(heat_map(plain_CSS, four_L / 3, 0.5, side)),
            "how like its anchor a patch is, or how strong its edges are: 0 is blue, the threshold or 0.5 white, 1 red",
        )


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
