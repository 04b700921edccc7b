"""Pictures for the tests of masking, ordinary and awkward ones, and what several tests say about masks.

B images, L patches of an image, K patches kept in the batch
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch
from torch import Generator, Tensor

from model.masking import Guidance, MaskingConfig, Masks, PatchedImages, PatchSelection, choose_patches


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pictures_BCHW(B: int = 6, size: int = 64, seed: int = 0, width: int | None = None) -> Tensor:
    """Smooth colour fields with a few rectangles and some noise: structure to cluster, normalised pixels."""
    rng = np.random.default_rng(seed)
    width = width or size
    y, x = np.mgrid[0:size, 0:width] / max(size, width)
    images = []
    for _ in range(B):
        image = np.stack([np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y) for _ in range(3)])
        for _ in range(4):
            top, left = rng.integers(0, max(1, size - 8)), rng.integers(0, max(1, width - 8))
            image[:, top : top + size // 3, left : left + width // 3] = rng.normal(0, 1, 3)[:, None, None]
        images.append(image + rng.normal(0, rng.choice([0.01, 0.5]), image.shape))
    return torch.tensor(np.stack(images), dtype=torch.float32)


def photos_BCHW(B: int = 6, size: int = 64, seed: int = 0) -> Tensor:
    """The same as uint8 pixels."""
    return (128 + 50 * pictures_BCHW(B, size, seed)).clamp(0, 255).to(torch.uint8)


def awkward_images(size: int = 64) -> dict[str, Tensor]:
    """Images on which formulas divide by zero, tie, or drown in rounding: name -> [4, 3, size, size]."""
    noise = torch.randn(4, 3, size, size, generator=generator())
    flat = torch.full((4, 3, size, size), 0.7)
    letterbox = pictures_BCHW(4, size)
    letterbox[:, :, : size // 4] = letterbox[:, :, -size // 4 :] = -1.8
    two_colours = torch.full((4, 3, size, size), -1.0)
    two_colours[:, :, :, size // 2 :] = 1.0
    lines = torch.zeros(4, 3, size, size)
    lines[:, :, ::7] = 1.0
    one_line = flat.clone()
    one_line[:, :, size // 2] = 1.0
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return {
        "flat": flat,
        "zero": torch.zeros_like(flat),
        "a grey level each": torch.linspace(-2, 2, 4)[:, None, None, None].expand_as(flat).contiguous(),
        "letterbox": letterbox,
        "two colours": two_colours,
        "checkerboard": ((x + y) % 2).float().expand_as(flat).contiguous(),
        "board of patches": ((x // 8 + y // 8) % 2).float().expand_as(flat).contiguous(),
        "low contrast": 2.0 + 5e-3 * noise,
        "noise": noise,
        "lines": lines,
        "one line": one_line,
        "half flat, half noise": torch.cat((torch.zeros_like(noise[:2]), noise[2:])),
    }


def contrast_of_patches(images: PatchedImages) -> Tensor:
    """Stands in for the attention of a model's copy."""
    return images.patches().float().var(2)


def choose(images_BCHW: Tensor, config: MaskingConfig, seed: int = 0, patch_size: int = 8, **guidance: float) -> Masks:
    """Masks of one batch; attention, where the strategy wants it, is the patches' contrast."""
    images = PatchedImages(images_BCHW, patch_size)
    return choose_patches(images, config, generator(seed), Guidance(class_attention=contrast_of_patches, **guidance))


def kept_BL(selection: PatchSelection, B: int, L: int) -> Tensor:
    """The selection as a bool mask."""
    return torch.zeros(B * L, dtype=torch.bool).index_fill(0, selection.kept_K, True).view(B, L)


def share_tolerance(share: float, draws: int, comparisons: int) -> float:
    """How far observed shares of independent draws may lie from `share`: beyond it once in a million test runs."""
    deviations = -NormalDist().inv_cdf(1e-6 / (2 * comparisons))
    return deviations * (share * (1 - share) / draws) ** 0.5
