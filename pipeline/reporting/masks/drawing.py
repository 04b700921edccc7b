"""Drawing on the patches of an image: what was dropped, which cluster a patch belongs to, how high it scores.

C = 3 channels, S side of an image in pixels, L patches of an image, G patches along a side, A anchors
"""

from __future__ import annotations

import colorsys
import io

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

# Smaller images are enlarged to this many pixels a side.
_MIN_SIDE = 224
# Dropped patches keep this much of their contrast, so that one sees what was dropped.
_DROPPED_CONTRAST = 0.12
_DROPPED_GREY = 112.0
# Lines between dropped patches tell them from grey areas of the image.
_LINE_GREY = 88.0
# The brightest tint leaves this much of the image; so much of it is left in a heat map.
_LEFT_OF_IMAGE = 0.25
# Neighbours on the colour circle are this far apart (the golden ratio): any number of clusters differ.
_HUE_STEP = 0.618034


def enlarge(image_CSS: Tensor, patch_size: int) -> tuple[Tensor, int]:
    """A uint8 image and its patch size, both a whole number of times as large if the image is small.

    Without smoothing: a patch stays a square with sharp edges.
    """
    zoom = max(1, -(-_MIN_SIDE // image_CSS.shape[1]))
    return image_CSS.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), patch_size * zoom


def grey_dropped(image_CSS: Tensor, dropped_L: Tensor, patch_size: int) -> Tensor:
    """The image with the dropped patches in grey, uint8 [3, S, S]."""
    pixels_CSS = image_CSS.float()
    place_S = torch.arange(image_CSS.shape[1]) % patch_size
    on_line_S = place_S == patch_size - 1
    grey_SS = torch.where(on_line_S[:, None] | on_line_S, _LINE_GREY, _DROPPED_GREY)
    faded_CSS = grey_SS + _DROPPED_CONTRAST * (pixels_CSS - pixels_CSS.mean())
    return _to_uint8(torch.where(_spread(dropped_L, patch_size), faded_CSS, pixels_CSS))


def tint_clusters(image_CSS: Tensor, nearest_L: Tensor, strength_L: Tensor, patch_size: int) -> Tensor:
    """The image in grey, each patch in its cluster's colour: the stronger (0 to 1), the more; uint8 [3, S, S]."""
    colours_LC = torch.stack([cluster_colour(int(cluster)) for cluster in nearest_L])
    share_SS = _spread(strength_L.clamp(0, 1) * (1 - _LEFT_OF_IMAGE), patch_size)
    colour_CSS = torch.stack([_spread(channel_L, patch_size) for channel_L in colours_LC.unbind(1)])
    return _to_uint8(_grey(image_CSS).lerp(colour_CSS, share_SS))


def outline(image_CSS: Tensor, anchors_A: Tensor, patch_size: int) -> Tensor:
    """The image with a frame around each anchor, in the colour of its cluster within black and white."""
    picture = to_pillow(image_CSS)
    draw = ImageDraw.Draw(picture)
    grid_size, width = image_CSS.shape[1] // patch_size, max(1, patch_size // 16)
    for cluster, anchor in enumerate(anchors_A.tolist()):
        top, left = (patch_size * place for place in divmod(anchor, grid_size))
        colour = tuple(int(value) for value in cluster_colour(cluster).round())
        for inset, ink, lines in ((0, (0, 0, 0), 1), (1, (255, 255, 255), 1), (2, colour, 2)):
            near, far = inset * width, patch_size - 1 - inset * width
            draw.rectangle((left + near, top + near, left + far, top + far), outline=ink, width=lines * width)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def heat_map(image_CSS: Tensor, value_L: Tensor, middle: float, patch_size: int) -> Tensor:
    """The image in grey, each patch from blue (0 and below) through white (`middle`) to red (1): uint8 [3, S, S]."""
    blue_C, white_C, red_C = (torch.tensor(rgb) for rgb in ((40.0, 80.0, 200.0), (245.0,) * 3, (205.0, 30.0, 30.0)))
    value_SS = _spread(value_L.clamp(0, 1), patch_size)
    cold_CSS = blue_C[:, None, None].lerp(white_C[:, None, None], (value_SS / middle).clamp(max=1))
    heat_CSS = cold_CSS.lerp(red_C[:, None, None], ((value_SS - middle) / (1 - middle)).clamp(min=0))
    return _to_uint8(heat_CSS.lerp(_grey(image_CSS), _LEFT_OF_IMAGE))


def cluster_colour(cluster: int) -> Tensor:
    """RGB of the n-th cluster, 0 to 255, fp32 [3]."""
    return 255 * torch.tensor(colorsys.hsv_to_rgb((0.02 + cluster * _HUE_STEP) % 1, 0.85, 0.95))


def to_pillow(image_CSS: Tensor) -> Image.Image:
    """uint8 [3, height, width] as Pillow knows it."""
    return Image.fromarray(image_CSS.permute(1, 2, 0).numpy())


def jpeg_bytes(image: Image.Image) -> bytes:
    """A JPEG without colour subsampling, which would blur the edges of patches."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88, subsampling=0)
    return stream.getvalue()


def _spread(value_L: Tensor, patch_size: int) -> Tensor:
    """A value per patch as one per pixel, [L] -> [S, S]; images are square."""
    grid_size = round(value_L.numel() ** 0.5)
    value_GG = value_L.view(grid_size, grid_size)
    return value_GG.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)


def _grey(image_CSS: Tensor) -> Tensor:
    return image_CSS.float().mean(dim=0, keepdim=True).expand(3, -1, -1)


def _to_uint8(pixels_CSS: Tensor) -> Tensor:
    return pixels_CSS.round().clamp(0, 255).to(torch.uint8)
