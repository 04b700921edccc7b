"""Image bytes -> uint8 tensors of the training size.

C = 3 channels, H, W height and width
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from formats.pictures import decode_picture
from model.packing import PIXEL_MEAN, PIXEL_STD, normalize_pixels

ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]

# Of an image longer than this many times its width, only the middle is resized: all of it could be gigabytes.
_MAX_ASPECT = 20
# Width over height of random crops.
_ASPECTS = (3 / 4, 4 / 3)
_LOG_ASPECTS = (math.log(_ASPECTS[0]), math.log(_ASPECTS[1]))
_PILLOW: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


def decode_image(data: bytes) -> Tensor:
    """JPEG, PNG or WebP bytes -> uint8 RGB [3, H, W], by the rule of formats.pictures.

    Raises ImageError for bytes that are not a picture, are cut short, or exceed the limits.
    """
    return torch.from_numpy(decode_picture(data)).permute(2, 0, 1)


def resize(image_CHW: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic on uint8 [3, H, W], within 0.05 grey levels of Pillow's on photographs."""
    if image_CHW.shape[1:] == (height, width):
        return image_CHW
    resized = F.interpolate(
        image_CHW.unsqueeze(0), (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.squeeze(0)


@dataclass(frozen=True)
class Preprocessing:
    """How a whole image becomes a model's pixels: resized, cropped in the middle, normalised.

    size: of the square that comes out, in pixels
    resized: what the shorter side, the longer one or both are resized to; none: `size`
    fill: grey level beside an image whose longer side was resized
    floor_offsets: half a pixel that a crop leaves over goes up and left, as in transformers; else it is rounded, as in
        torchvision
    """

    size: int
    resized: int | None = None
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: int = 0
    floor_offsets: bool = False
    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[float, float, float] = PIXEL_STD

    def __call__(self, image_CHW: Tensor) -> Tensor:
        """The square, uint8 [3, size, size]; the same pixels, to the bit, as open_clip and CLIP_benchmark make.

        Resized by Pillow and rounded as torchvision does: longer side down, offset to the nearest.
        """
        if self.resize_mode == "shortest":
            longest = _MAX_ASPECT * min(image_CHW.shape[1:])
            image_CHW = self._middle(image_CHW, min(image_CHW.shape[1], longest), min(image_CHW.shape[2], longest))
        _, H, W = image_CHW.shape
        height, width = self._resized_to(H, W)
        if (height, width) != (H, W):
            picture = Image.fromarray(np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()))
            resized_HWC = np.array(picture.resize((width, height), _PILLOW[self.interpolation]))
            image_CHW = torch.from_numpy(resized_HWC).permute(2, 0, 1)
        return self._middle(self._padded(image_CHW), self.size, self.size).contiguous()

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images -> float32 with this mean and deviation; same shape."""
        return normalize_pixels(images_BCHW, self.mean, self.std)

    def _resized_to(self, H: int, W: int) -> tuple[int, int]:
        size = self.resized or self.size
        if self.resize_mode == "squash":
            return size, size
        if self.resize_mode == "shortest":
            return size * H // min(H, W), size * W // min(H, W)
        ratio = max(H / size, W / size)
        return max(1, round(H / ratio)), max(1, round(W / ratio))

    def _padded(self, image_CHW: Tensor) -> Tensor:
        """At least `size` on both sides; of an odd number of missing lines the last is below and on the right."""
        missing = [max(0, self.size - side) for side in image_CHW.shape[:0:-1]]
        before_and_after = [part for lines in missing for part in (lines // 2, lines - lines // 2)]
        return F.pad(image_CHW, before_and_after, value=self.fill) if any(missing) else image_CHW

    def _middle(self, image_CHW: Tensor, height: int, width: int) -> Tensor:
        _, H, W = image_CHW.shape
        top, left = (H - height) / 2, (W - width) / 2
        top, left = (int(top), int(left)) if self.floor_offsets else (round(top), round(left))
        return image_CHW[:, top : top + height, left : left + width]


def resize_center_crop(image_CHW: Tensor, size: int) -> Tensor:
    """The preprocessing of models trained here: shorter side to `size`, then the middle square."""
    return Preprocessing(size)(image_CHW)


def random_crop_box(height: int, width: int, min_area: float, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of at least `min_area` of an image, sides within 3:4.

    Where ten draws do not fit, the largest middle with sides within 3:4, as in torchvision.
    """
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(*_LOG_ASPECTS))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = max(1, min(height, round(width / _ASPECTS[0]))), max(1, min(width, round(height * _ASPECTS[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(image_CHW: Tensor, size: int, min_area: float, rng: random.Random) -> Tensor:
    """The training transform: a random crop to `size`, uint8 [3, size, size]."""
    _, H, W = image_CHW.shape
    top, left, height, width = random_crop_box(H, W, min_area, rng)
    return resize(image_CHW[:, top : top + height, left : left + width], size, size)
