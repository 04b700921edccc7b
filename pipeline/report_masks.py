"""Pictures of what each masking strategy hides on real images.

B images, C = 3 channels, S side in pixels, L patches of an image, G patches along a side
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor

from model.config import config_from_name
from model.masking import MaskingConfig, PatchedImages, choose_patches
from pipeline.errors import UserError
from pipeline.evaluation.datasets import ClassificationSet, RetrievalSet, open_evaluation_set
from pipeline.evaluation.tar_samples import ImageFile
from pipeline.image_transform import ImageError, decode_image, resize_center_crop
from pipeline.manifest import MANIFEST, read_manifest
from pipeline.recipe import Recipe

STRATEGIES = ("random", "cluster")

_NUM_IMAGES = 8
_MIN_SIDE = 224
# Hidden patches keep this much of their contrast, so that one sees what was hidden.
_HIDDEN_CONTRAST = 0.12
_HIDDEN_GREY = 112.0
# Lines between hidden patches tell them from grey areas of the image.
_EDGE_GREY = 88.0


@dataclass(frozen=True)
class CaptionedImage:
    """An image to show, and what is said of it."""

    image: ImageFile
    caption: str


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


def draw_masks(directory: Path, recipe: Recipe) -> PictureGrid:
    """Mask some images of an evaluation set or a shard directory as the recipe's model and ratios would.

    Raises UserError if the directory is neither, or an image does not decode.
    """
    samples = read_images(directory)
    vision = config_from_name(recipe.model.name).vision
    image_size = recipe.model.image_size or vision.image_size
    masking = recipe.masking.to_config()
    images_BCHW = torch.stack([_load(sample.image, image_size) for sample in samples])
    hidden_by_strategy = [
        hidden_patches(images_BCHW, vision.patch_size, replace(masking, strategy=strategy)) for strategy in STRATEGIES
    ]
    nothing_L = torch.zeros_like(hidden_by_strategy[0][0])
    rows = tuple(
        PictureRow(
            sample.caption,
            _draw(image_CHW, nothing_L, vision.patch_size),
            tuple(_draw(image_CHW, hidden_BL[index], vision.patch_size) for hidden_BL in hidden_by_strategy),
        )
        for index, (sample, image_CHW) in enumerate(zip(samples, images_BCHW, strict=True))
    )
    return PictureGrid(rows, masking, vision.patch_size, image_size)


def hidden_patches(images_BCHW: Tensor, patch_size: int, masking: MaskingConfig) -> Tensor:
    """Which patches training would drop from these uint8 images as one batch, bool [B, L]; the same in every call."""
    images = PatchedImages(images_BCHW, patch_size)
    selection = choose_patches(images, masking, Generator().manual_seed(0)).selection
    hidden_N = torch.ones(images.num_images * images.num_patches, dtype=torch.bool)
    hidden_N[selection.kept_K] = False
    return hidden_N.view(images.num_images, images.num_patches)


def read_images(directory: Path) -> list[CaptionedImage]:
    """Some images spread evenly over an evaluation set, or over the first shard of a shard directory."""
    if (directory / MANIFEST).is_file():
        return _images_of_shard(directory)
    dataset = open_evaluation_set(directory)
    if isinstance(dataset, ClassificationSet):
        labelled = [dataset.samples[index] for index in _spread(len(dataset.samples))]
        return [CaptionedImage(sample.image, dataset.class_names[sample.label]) for sample in labelled]
    if isinstance(dataset, RetrievalSet):
        pairs = [dataset.samples[index] for index in _spread(len(dataset.samples))]
        return [CaptionedImage(sample.image, sample.captions[0]) for sample in pairs]
    captions = {sample.image: sample.caption for sample in dataset.samples}
    images = list(captions)
    return [CaptionedImage(images[index], captions[images[index]]) for index in _spread(len(images))]


def _images_of_shard(directory: Path) -> list[CaptionedImage]:
    path, index = read_manifest(str(directory)).shards[0].read_index()
    samples = []
    for position in _spread(len(index.keys)):
        image_offset, image_size, caption_offset, caption_size = map(int, index.spans_n4[position])
        with path.open("rb") as tar:
            tar.seek(caption_offset)
            caption = tar.read(caption_size).decode("utf-8", "replace").strip()
        image = ImageFile(path, index.keys[position], image_offset, image_size)
        samples.append(CaptionedImage(image, caption))
    return samples


def _spread(total: int) -> list[int]:
    count = min(total, _NUM_IMAGES)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _load(image: ImageFile, size: int) -> Tensor:
    try:
        return resize_center_crop(decode_image(image.read()), size)
    except ImageError as error:
        raise UserError(f"{image} does not decode: {error}") from error


def _draw(image_CHW: Tensor, hidden_L: Tensor, patch_size: int) -> Picture:
    # small images are enlarged without smoothing: a patch stays a square with sharp edges
    zoom = max(1, -(-_MIN_SIDE // image_CHW.shape[1]))
    pixels_CHW = image_CHW.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).float()
    side = patch_size * zoom
    grid_size = pixels_CHW.shape[1] // side
    hidden_SS = hidden_L.view(grid_size, grid_size).repeat_interleave(side, 0).repeat_interleave(side, 1)
    on_edge_S = torch.arange(grid_size * side) % side == side - 1
    grey_SS = torch.where(on_edge_S[:, None] | on_edge_S, _EDGE_GREY, _HIDDEN_GREY)
    faded_CHW = grey_SS + _HIDDEN_CONTRAST * (pixels_CHW - pixels_CHW.mean())
    shown_CHW = torch.where(hidden_SS, faded_CHW, pixels_CHW).round().clamp(0, 255).to(torch.uint8)
    return Picture(_jpeg(shown_CHW), hidden_L.float().mean().item())


def _jpeg(image_CHW: Tensor) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=88, subsampling=0)
    return stream.getvalue()


def side_by_side(jpegs: Sequence[bytes]) -> bytes:
    """Equally high JPEGs as one, with a gap between them."""
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
    gap = 8
    strip = Image.new("RGB", (sum(image.width + gap for image in images) - gap, images[0].height), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width + gap
    stream = io.BytesIO()
    strip.save(stream, "JPEG", quality=88, subsampling=0)
    return stream.getvalue()
