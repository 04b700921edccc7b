"""Weights under the names of transformers' `CLIPModel`.

It has separate query, key and value projections, and its two output projections are linear layers, [out, in].
Source: `transformers.models.clip.modeling_clip` (https://github.com/huggingface/transformers).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_TOWERS = {"visual": "vision_model", "text": "text_model"}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text.text_projection": "text_projection.weight"}
_OUTSIDE_BLOCKS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.patch_embedding.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `model.clip.CLIP` as `CLIPModel`'s; values are views where they can be.

    The patch embedding [D, 3 * p * p] becomes a convolution's [D, 3, p, p], `logit_scale` [1] becomes a scalar.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.T
        elif name in _OUTSIDE_BLOCKS:
            renamed[_OUTSIDE_BLOCKS[name]] = _to_their_shape(name, value)
        else:
            renamed |= _rename_in_block(name, value)
    return renamed


def from_transformers(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Inverse of `to_transformers`; `names` are those of the model to be loaded, which its depth decides.

    Raises ValueError for a weight that one side has and the other has not.
    """
    renamed: dict[str, Tensor] = {}
    left = dict(weights)
    try:
        for name in names:
            if name in _TRANSPOSED:
                renamed[name] = left.pop(_TRANSPOSED[name]).T
            elif name in _OUTSIDE_BLOCKS:
                renamed[name] = _to_our_shape(name, left.pop(_OUTSIDE_BLOCKS[name]))
            else:
                renamed[name] = torch.cat([left.pop(theirs) for theirs in _names_in_block(name)])
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing: these are not the weights of such a CLIPModel") from error
    if left:
        raise ValueError(f"{next(iter(left))} is not a weight of such a CLIPModel")
    return renamed


def _to_their_shape(name: str, value: Tensor) -> Tensor:
    if name == "logit_scale":
        return value.reshape(())
    if name == "visual.patch_embedding.weight":
        patch_size = math.isqrt(value.shape[1] // 3)
        value = value.unflatten(1, (3, patch_size, patch_size))
    return value


def _to_our_shape(name: str, value: Tensor) -> Tensor:
    if name == "logit_scale":
        return value.reshape(1)
    return value.flatten(1) if name == "visual.patch_embedding.weight" else value


def _rename_in_block(name: str, value: Tensor) -> dict[str, Tensor]:
    names = _names_in_block(name)
    return dict(zip(names, value.chunk(len(names)), strict=True))


def _names_in_block(name: str) -> list[str]:
    """`text.transformer.resblocks.3.mlp.c_fc.bias` -> [`text_model.encoder.layers.3.mlp.fc1.bias`]."""
    tower, _, _, layer, member = name.split(".", 4)
    prefix = f"{_TOWERS[tower]}.encoder.layers.{layer}"
    if member.startswith("attn.in_proj_"):
        kind = member.removeprefix("attn.in_proj_")
        return [f"{prefix}.self_attn.{part}_proj.{kind}" for part in "qkv"]
    module, _, kind = member.rpartition(".")
    return [f"{prefix}.{_IN_BLOCK[module]}.{kind}"]
