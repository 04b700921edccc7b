"""The sheet that mask-preview shows: pictures in rows and columns, with what is to be read about them.

B images, S side of an image in pixels, L patches of an image
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from torch import Tensor

from formats.errors import UserError
from model.masking import PatchedImages
from pipeline.image_sources import CaptionedImage
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


_PAPER, _INK, _SOFT_INK = "#ffffff", "#1c2129", "#5b6472"
# A side that JPEG can hold, and a size that memory can.
_MAX_SIDE, _MAX_PIXELS = 65_000, 200_000_000
# Letters grow with the pictures: a large sheet is looked at from further away.
_PICTURE_PER_FONT, _MIN_FONT = 13, 16


def paint(sheet: Sheet) -> Image.Image:
    """Labels above the columns, a note under each picture, the statistics at the end.

    Raises UserError if the sheet would be too large.
    """
    side = sheet.rows[0].cells[0].picture.width
    font = _font(max(_MIN_FONT, side // _PICTURE_PER_FONT))
    line, gap = round(1.4 * font.size), round(0.6 * font.size)
    margin, columns = 2 * gap, len(sheet.rows[0].cells)
    width = 2 * margin + columns * side + (columns - 1) * gap
    text_width = width - 2 * margin
    title, summaries = _wrap([sheet.title], font, text_width), _wrap(map(str, sheet.summaries), font, text_width)
    row_height = side + line + gap
    height = 2 * margin + (len(title) + 1 + len(summaries)) * line + 2 * gap + len(sheet.rows) * row_height
    _check_size(width, height)

    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = _write(draw, title, margin, margin, font, line, _SOFT_INK) + gap
    lefts = [margin + column * (side + gap) for column in range(columns)]
    for left, cell in zip(lefts, sheet.rows[0].cells, strict=True):
        draw.text((left, top), _elide(cell.label, font, side), _INK, font)
    top += line
    for row in sheet.rows:
        for left, cell in zip(lefts, row.cells, strict=True):
            canvas.paste(cell.picture, (left, top))
            draw.text((left, top + side + gap // 3), _elide(cell.note, font, side), _SOFT_INK, font)
        top += row_height
    _write(draw, summaries, margin, top + gap, font, line, _INK)
    return canvas


def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, FreeTypeFont), "Pillow was built without FreeType"
    return font


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int, font: FreeTypeFont, height: int, ink: str
) -> int:
    """Lines of text under each other; returns where the next one would be."""
    for text in lines:
        draw.text((left, top), text, ink, font)
        top += height
    return top


def _wrap(texts: Iterable[str], font: FreeTypeFont, width: int) -> list[str]:
    """Texts as lines that are no wider than this, broken between words."""
    lines = []
    for text in texts:
        words = text.split()
        current = words[0]
        for word in words[1:]:
            longer = f"{current} {word}"
            if font.getlength(longer) > width:
                lines.append(current)
                current = word
            else:
                current = longer
        lines.append(current)
    return lines


def _elide(text: str, font: FreeTypeFont, width: int) -> str:
    """The text, or its beginning and "…" where it is too wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _check_size(width: int, height: int) -> None:
    if max(width, height) > _MAX_SIDE or width * height > _MAX_PIXELS:
        raise UserError(
            f"a sheet of {width} x {height} pixels is too large: take fewer --images or --strategies, or write .html"
        )
