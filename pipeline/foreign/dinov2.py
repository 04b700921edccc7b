"""DINOv2 in a transformers folder: the features of images, of its class token; a tower without text.

Source: "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193), as in transformers.

B images, H, W their sides, L patches, D width, h heads
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.errors import UserError
from pipeline.data.image_transform import Preprocessing
from pipeline.foreign.fields import UNREADABLE, square, with_defaults
from pipeline.foreign.tensor_files import find_parts, read_parts, sha256_of_parts
from pipeline.foreign.transformers_folder import CONFIG, IMAGE_PROCESSOR, WEIGHTS_NAMES, read_preprocessing

_DEFAULTS: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14}
_DEFAULTS |= {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "use_swiglu_ffn": False, "num_channels": 3}
# What transformers 5 calls the projections of attention, and those before it.
_OLD_NAMES = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
_OLD_NAMES |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
_NOT_READ = ("mask_token", "classifier.weight", "classifier.bias")


@dataclass(frozen=True)
class Dinov2:
    """The model: its weights by transformers' names, and how images become its pixels."""

    name: str
    weights: Mapping[str, Tensor]
    sha256: str
    preprocessing: Preprocessing
    width: int
    layers: int
    heads: int
    patch_size: int
    eps: float

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """The class token after the last layer and its norm [B, D], of normalised images."""
        tokens_BLD = self._embed(images_BCHW)
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            attended_BLD = self._attend(self._norm(tokens_BLD, f"{name}.norm1"), f"{name}.attention")
            tokens_BLD = tokens_BLD + self.weights[f"{name}.layer_scale1.lambda1"] * attended_BLD
            hidden = F.gelu(self._linear(self._norm(tokens_BLD, f"{name}.norm2"), f"{name}.mlp.fc1"))
            tokens_BLD = tokens_BLD + self.weights[f"{name}.layer_scale2.lambda1"] * self._linear(
                hidden, f"{name}.mlp.fc2"
            )
        return self._norm(tokens_BLD[:, 0], "layernorm")

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        """Patches behind a class token, with positions that are stretched to the images' size, as in pre-training."""
        name = "embeddings.patch_embeddings.projection"
        grid_BDHW = F.conv2d(images_BCHW, *self._pair(name), stride=self.patch_size)
        class_1LD = self.weights["embeddings.cls_token"]
        tokens_BLD = torch.cat([class_1LD.expand(len(grid_BDHW), -1, -1), grid_BDHW.flatten(2).transpose(1, 2)], 1)
        positions_1LD = self.weights["embeddings.position_embeddings"]
        if positions_1LD.shape[1] != tokens_BLD.shape[1]:
            side = int((positions_1LD.shape[1] - 1) ** 0.5)
            known_1DHW = positions_1LD[:, 1:].transpose(1, 2).unflatten(2, (side, side))
            stretched_1DHW = F.interpolate(known_1DHW, grid_BDHW.shape[2:], mode="bicubic", align_corners=False)
            positions_1LD = torch.cat([positions_1LD[:, :1], stretched_1DHW.flatten(2).transpose(1, 2)], 1)
        return tokens_BLD + positions_1LD

    def _attend(self, tokens_BLD: Tensor, name: str) -> Tensor:
        query, key, value = (
            self._linear(tokens_BLD, f"{name}.{kind}_proj").unflatten(2, (self.heads, -1)).transpose(1, 2)
            for kind in "qkv"
        )
        attended_BhLD = F.scaled_dot_product_attention(query, key, value)
        return self._linear(attended_BhLD.transpose(1, 2).flatten(2), f"{name}.o_proj")

    def _norm(self, tokens: Tensor, name: str) -> Tensor:
        return F.layer_norm(tokens, (self.width,), *self._pair(name), self.eps)

    def _linear(self, tokens: Tensor, name: str) -> Tensor:
        return F.linear(tokens, *self._pair(name))

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]


def is_dinov2(folder: Path) -> bool:
    """Whether a folder's configuration says that it holds one."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") == "dinov2"


def read_dinov2(folder: Path, device: torch.device) -> Dinov2:
    """The model of a folder, fp32. Raises UserError for what is missing, does not fit, or is not done here."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        fields = with_defaults(content, _DEFAULTS)
        if fields["use_swiglu_ffn"] or fields["hidden_act"] != "gelu" or fields["num_channels"] != 3:
            raise ValueError("only those with GELU and three channels are done here, which the giant one is not")
        size = square("crop_size", json.loads((folder / IMAGE_PROCESSOR).read_text(encoding="utf-8"))["crop_size"])
        patch_size = square("patch_size", fields["patch_size"])
        if size % patch_size or fields["hidden_size"] % fields["num_attention_heads"]:
            raise ValueError(f"images of {size} pixels are not whole patches of {patch_size}")
    except UNREADABLE as error:
        raise UserError(f"{folder} does not describe a DINOv2 that can be used here: {error}") from error
    parts = find_parts(folder, WEIGHTS_NAMES)
    if not parts:
        raise UserError(f"{folder} has {CONFIG}, and none of {', '.join(WEIGHTS_NAMES)}")
    layers, width = fields["num_hidden_layers"], fields["hidden_size"]
    weights = _renamed(read_parts(parts)[0])
    expected = _shapes(weights, layers, width, patch_size)
    if wrong := [name for name, shape in expected.items() if name not in weights or weights[name].shape != shape]:
        raise UserError(f"{folder} is not what its {CONFIG} describes: {wrong[0]} is missing or of another shape")
    if extra := weights.keys() - expected.keys():
        raise UserError(f"{folder} is not what its {CONFIG} describes: it has {min(extra)} too")
    return Dinov2(
        name=folder.resolve().name,
        weights={name: weight.to(device, torch.float32) for name, weight in weights.items()},
        sha256=sha256_of_parts(parts),
        preprocessing=read_preprocessing(folder, size),
        width=width,
        layers=layers,
        heads=fields["num_attention_heads"],
        patch_size=patch_size,
        eps=fields["layer_norm_eps"],
    )


def _renamed(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of `Dinov2Model`, without those that images do not need."""
    old = re.compile("|".join(map(re.escape, _OLD_NAMES)))
    names = {name: old.sub(lambda match: _OLD_NAMES[match[0]], name.removeprefix("dinov2.")) for name in theirs}
    return {name: theirs[before] for before, name in names.items() if not name.endswith(_NOT_READ)}


def _shapes(weights: Mapping[str, Any], layers: int, width: int, patch_size: int) -> dict[str, tuple[int, ...]]:
    """Of every weight; positions and the width inside of an MLP are what the file says."""
    positions = weights.get("embeddings.position_embeddings", torch.empty(0))
    hidden = weights.get("encoder.layer.0.mlp.fc1.bias", torch.empty(0)).numel()
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, positions.numel() // width, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch_size, patch_size),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    linears = {f"attention.{kind}_proj": (width, width) for kind in "qkvo"}
    linears |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for layer in (f"encoder.layer.{number}" for number in range(layers)):
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
        for name in (*norms, "layer_scale1.lambda1", "layer_scale2.lambda1"):
            shapes[f"{layer}.{name}"] = (width,)
    return shapes
