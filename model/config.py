"""Shapes of the models: open_clip's names and sizes, and small ones for a CPU."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VisionConfig:
    """Vision transformer: `image_size` and `patch_size` in pixels, `heads` x head width = `width`."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, L."""
        return self.grid_size**2


@dataclass(frozen=True)
class TextConfig:
    """Causal text transformer; the feature is read at `eot_token_id`, the last token of every caption."""

    width: int
    layers: int
    heads: int
    context_length: int = 77
    vocab_size: int = 49408
    eot_token_id: int = 49407
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class CLIPConfig:
    """A two-tower model; `embed_dim` is the width of the shared space."""

    name: str
    embed_dim: int
    vision: VisionConfig
    text: TextConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, the content of a checkpoint's `model.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> CLIPConfig:
        """Inverse of `to_dict`; raises TypeError for an unknown or a missing field."""
        fields = dict(fields)
        vision, text = VisionConfig(**fields.pop("vision")), TextConfig(**fields.pop("text"))
        return CLIPConfig(vision=vision, text=text, **fields)


def _config(name: str, embed_dim: int, vision: tuple[int, ...], text: tuple[int, int, int]) -> CLIPConfig:
    image_size, patch_size, width, layers, heads = vision
    return CLIPConfig(
        name=name,
        embed_dim=embed_dim,
        vision=VisionConfig(image_size, patch_size, width, layers, heads),
        text=TextConfig(*text),
    )


# name, embed_dim, vision (image, patch, width, layers, heads), text (width, layers, heads).
# The first block has the sizes of open_clip's model files of the same name; the second is for CPUs.
_CONFIGS = [
    _config("ViT-S-32", 384, (224, 32, 384, 12, 6), (384, 12, 6)),
    _config("ViT-S-16", 384, (224, 16, 384, 12, 6), (384, 12, 6)),
    _config("ViT-B-32", 512, (224, 32, 768, 12, 12), (512, 12, 8)),
    _config("ViT-B-16", 512, (224, 16, 768, 12, 12), (512, 12, 8)),
    _config("ViT-L-16", 768, (224, 16, 1024, 24, 16), (768, 12, 12)),
    _config("ViT-L-14", 768, (224, 14, 1024, 24, 16), (768, 12, 12)),
    _config("ViT-H-14", 1024, (224, 14, 1280, 32, 16), (1024, 24, 16)),
    _config("ViT-tiny-16", 192, (224, 16, 192, 6, 3), (192, 4, 3)),
    _config("ViT-tiny-8", 192, (64, 8, 192, 6, 3), (192, 4, 3)),
    _config("ViT-nano-8", 128, (64, 8, 128, 4, 4), (128, 3, 4)),
    _config("ViT-test-8", 32, (32, 8, 32, 2, 2), (32, 2, 2)),
]
CONFIGS: dict[str, CLIPConfig] = {config.name: config for config in _CONFIGS}


def config_from_name(name: str) -> CLIPConfig:
    """The named model's configuration; raises ValueError with the nearest known name."""
    if name in CONFIGS:
        return CONFIGS[name]
    near = difflib.get_close_matches(name, CONFIGS, n=1, cutoff=0.0)
    raise ValueError(f"unknown model {name!r}: did you mean {near[0]!r}? known: {', '.join(CONFIGS)}")
