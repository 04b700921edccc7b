"""Images that behave like photographs where masking is concerned: smooth regions, some texture."""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_images(count: int, image_size: int, seed: int = 0) -> Tensor:
    """Normalised images [count, 3, S, S]: smooth random colour fields with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 14, 14, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (image_size, image_size), mode="bicubic")
    return images + 0.1 * torch.randn(images.shape, generator=generator)
