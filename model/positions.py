"""Positional embeddings for another number of positions than they were trained with.

L patches of an image, G patches along its side, T positions, D width
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_IMAGE, _TEXT = "visual.positional_embedding", "text.positional_embedding"


def fit_positions(weights: Mapping[str, Tensor], num_patches: int, context_length: int) -> dict[str, Tensor]:
    """Weights of `model.clip.CLIP` with positions for this many patches of an image and tokens of a caption.

    Captions have the first of the positions there are: their features stay the same. ValueError if there are fewer
    than `context_length`: what the others would have become cannot be known.
    """
    fitted = dict(weights)
    fitted[_IMAGE] = resize_grid(weights[_IMAGE], num_patches)
    available = weights[_TEXT].shape[0]
    if available < context_length:
        raise ValueError(f"captions have {available} positions, fewer than the {context_length} of the model")
    fitted[_TEXT] = weights[_TEXT][:context_length]
    return fitted


def resize_grid(positions_TD: Tensor, num_patches: int) -> Tensor:
    """Class token's and patches' positions for another square grid: bicubic, antialiased, [1 + L, D] -> [1 + L', D].

    ValueError if the patches are not a square. Source: open_clip's `resize_pos_embed`.
    """
    class_1D, patches_LD = positions_TD[:1], positions_TD[1:]
    old, new = math.isqrt(patches_LD.shape[0]), math.isqrt(num_patches)
    if old * old != patches_LD.shape[0]:
        raise ValueError(f"{patches_LD.shape[0]} positions of patches are not a square")
    if old == new:
        return positions_TD
    grid_1DGG = patches_LD.float().T.unflatten(1, (old, old)).unsqueeze(0)
    resized_1DGG = F.interpolate(grid_1DGG, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((class_1D, resized_1DGG.squeeze(0).flatten(1).T.to(class_1D.dtype)))
