"""Weights under open_clip's names: `visual.*` is shared, the text tower's `text.` prefix and two shapes are not.

Source: `open_clip.model.CLIP` with a ViT image tower (https://github.com/mlfoundations/open_clip).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

_PATCHES, _CONVOLUTION = "visual.patch_embedding.weight", "visual.conv1.weight"
_SCALARS = {"logit_scale", "logit_bias"}
_TEXT = "text."
_TEXT_MEMBERS = {"token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"}


def to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `model.clip.CLIP` as open_clip's; values are views where they can be.

    The patch embedding [D, 3 * p * p] becomes a convolution's [D, 3, p, p], `logit_scale` and `logit_bias` scalars.
    """
    renamed = {name.removeprefix(_TEXT): value for name, value in weights.items()}
    patches_DP = renamed.pop(_PATCHES)
    patch_size = math.isqrt(patches_DP.shape[1] // 3)
    renamed[_CONVOLUTION] = patches_DP.unflatten(1, (3, patch_size, patch_size))
    return {name: value.reshape(()) if name in _SCALARS else value for name, value in renamed.items()}


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_open_clip`: the state dict of an open_clip model, ready for `CLIP.load_state_dict`.

    Weights do not say which activation and pooling they were trained with: the model they are loaded into has to be
    told. The text tower may have its prefix, as in open_clip's models with `custom_text`. Raises ValueError for weights
    that open_clip's ViT models do not have (ResNet and timm towers, other text towers).
    """
    renamed = {}
    for name, value in weights.items():
        if name == _CONVOLUTION:
            renamed[_PATCHES] = value.flatten(1)
        elif name in _SCALARS:
            renamed[name] = value.reshape(1)
        elif name.startswith("visual."):
            renamed[name] = value
        elif name.removeprefix(_TEXT).partition(".")[0] in _TEXT_MEMBERS:
            renamed[_TEXT + name.removeprefix(_TEXT)] = value
        else:
            raise ValueError(f"{name} is not a weight of an open_clip CLIP with a ViT image tower")
    if _PATCHES not in renamed:
        raise ValueError(f"no {_CONVOLUTION}: these are not the weights of an open_clip CLIP with a ViT image tower")
    return renamed
