"""Images as grids of patches.

B images, C, H, W an image, L patches of an image, P = C * patch_size**2 values of a patch, K patches kept in the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Per-channel statistics of OpenAI's CLIP training images, the convention of the field.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(
    images_BCHW: Tensor, means: Sequence[float] = PIXEL_MEAN, deviations: Sequence[float] = PIXEL_STD
) -> Tensor:
    """uint8 RGB images [B, 3, H, W] or [3, H, W] -> float32 with about zero mean and unit variance, same shape."""
    images_BCHW = images_BCHW.to(torch.float32, copy=True)  # whatever is passed stays as it is
    # channel by channel: a tensor of the statistics would have to be copied to the device, for which the host waits
    for channel_BHW, mean, std in zip(images_BCHW.unbind(-3), means, deviations, strict=True):
        channel_BHW.sub_(255 * mean).div_(255 * std)
    return images_BCHW


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, [B, C, H, W] -> [B, L, P] with P = C * patch_size**2 in (channel, row, column) order.

    Raises ValueError if the image is not a whole number of patches high and wide.
    """
    B, C, H, W = images_BCHW.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"an image of {H} x {W} pixels cannot be cut into patches of {patch_size}")
    grid = images_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch_size**2)


@dataclass(frozen=True)
class PatchedImages:
    """A batch of images, cut into patches only where and when they are needed.

    images_BCHW: uint8 RGB, normalised on the way out; or floats, taken to be normalised
    """

    images_BCHW: Tensor
    patch_size: int

    @property
    def num_images(self) -> int:
        """B."""
        return self.images_BCHW.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image as (rows, columns)."""
        _, _, H, W = self.images_BCHW.shape
        return H // self.patch_size, W // self.patch_size

    @property
    def num_patches(self) -> int:
        """L."""
        rows, columns = self.grid
        return rows * columns

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images_BCHW.device

    def normalized(self, images: slice = slice(None)) -> Tensor:
        """Normalised pixels [b, C, H, W], fp32 where they come from uint8, of some images of the batch."""
        chosen_BCHW = self.images_BCHW[images]
        return normalize_pixels(chosen_BCHW) if chosen_BCHW.dtype == torch.uint8 else chosen_BCHW

    def patches(self, images: slice = slice(None)) -> Tensor:
        """All patches of some images of the batch, normalised: [b, L, P]."""
        return patchify(self.normalized(images), self.patch_size)

    def gather(self, kept_K: Tensor) -> Tensor:
        """The patches with flat indices b * L + l, normalised: [K, P]. Dropped patches are never normalised."""
        patches_KP = patchify(self.images_BCHW, self.patch_size).flatten(0, 1).index_select(0, kept_K)
        if patches_KP.dtype != torch.uint8:
            return patches_KP
        channels = self.images_BCHW.shape[1]
        return normalize_pixels(patches_KP.unflatten(1, (channels, -1, 1))).flatten(1)
