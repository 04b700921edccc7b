"""Pictures of what each masking strategy hides on real images, for the report.

B images, C = 3 channels, S side in pixels, L patches of an image
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.config import config_from_name
from model.masking import MaskingConfig, PatchedImages
from pipeline.image_sources import load_image, read_images
from pipeline.recipe import Recipe
from pipeline.reporting.masks.anatomy import dissect
from pipeline.reporting.masks.drawing import enlarge, grey_dropped, jpeg_bytes, to_pillow

STRATEGIES = ("random", "cluster")


@dataclass(frozen=True)
class Picture:
    """One cell of the grid: JPEG bytes and the share of patches hidden."""

    jpeg: bytes
    hidden: float


@dataclass(frozen=True)
class PictureRow:
    """An image: as it is, then under each of STRATEGIES."""

    caption: str
    original: Picture
    masked: tuple[Picture, ...]


@dataclass(frozen=True)
class PictureGrid:
    """The rows, and the setting they were masked with."""

    rows: tuple[PictureRow, ...]
    masking: MaskingConfig
    patch_size: int
    image_size: int


def draw_masks(source: Path, recipe: Recipe) -> PictureGrid:
    """Mask some images of a folder, a tar, a shard directory or an evaluation set as the recipe's model would.

    Raises UserError if the source holds no images, or one does not decode.
    """
    samples = read_images(source)
    vision = config_from_name(recipe.model.name).vision
    image_size = recipe.model.image_size or vision.image_size
    masking = recipe.masking
    images_BCSS = torch.stack([load_image(sample.image, image_size) for sample in samples])
    images = PatchedImages(images_BCSS, vision.patch_size)
    dropped_by_strategy = [
        dissect(images, replace(masking, strategy=strategy), seed=0).dropped_BL for strategy in STRATEGIES
    ]
    nothing_L = torch.zeros_like(dropped_by_strategy[0][0])
    rows = tuple(
        PictureRow(
            sample.caption,
            _draw(image_CSS, nothing_L, vision.patch_size),
            tuple(_draw(image_CSS, dropped_BL[index], vision.patch_size) for dropped_BL in dropped_by_strategy),
        )
        for index, (sample, image_CSS) in enumerate(zip(samples, images_BCSS, strict=True))
    )
    return PictureGrid(rows, masking, vision.patch_size, image_size)


def _draw(image_CSS: Tensor, dropped_L: Tensor, patch_size: int) -> Picture:
    image_CSS, patch_size = enlarge(image_CSS, patch_size)
    shown_CSS = grey_dropped(image_CSS, dropped_L, patch_size)
    return Picture(jpeg_bytes(to_pillow(shown_CSS)), dropped_L.float().mean().item())


def side_by_side(jpegs: Sequence[bytes]) -> bytes:
    """Equally high JPEGs as one, with a gap between them."""
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
    gap = 8
    strip = Image.new("RGB", (sum(image.width + gap for image in images) - gap, images[0].height), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width + gap
    return jpeg_bytes(strip)
