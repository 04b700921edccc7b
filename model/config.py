"""Shapes and variants of the models: open_clip's names and sizes, and small ones for a CPU."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Pool = Literal["class", "average", "attention"]
Activation = Literal["gelu", "quick_gelu"]
TextAttention = Literal["causal", "bidirectional"]
TextPool = Literal["last", "mean"]


@dataclass(frozen=True)
class VisionConfig:
    """Vision transformer: `image_size` and `patch_size` in pixels, `heads` x head width = `width`.

    pool: what the image's feature is read from: the class token, the mean over its patches, or SigLIP's attention head
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    pool: Pool = "class"
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        _check_known("pool", self.pool, get_args(Pool))
        _check_known("activation", self.activation, get_args(Activation))
        _check_sizes(self, "image_size", "patch_size", "width", "layers", "heads")
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
    """Text transformer; every caption ends in `eot_token_id`.

    attention: whether a token sees those before it and itself, or the whole caption
    pool: what the caption's feature is read from: its last token, or the mean over all, which sees a whole caption only
        where every token does
    """

    width: int
    layers: int
    heads: int
    context_length: int = 77
    vocab_size: int = 49408
    eot_token_id: int = 49407
    mlp_ratio: float = 4.0
    activation: Activation = "gelu"
    attention: TextAttention = "causal"
    pool: TextPool = "last"

    def __post_init__(self) -> None:
        _check_known("activation", self.activation, get_args(Activation))
        _check_known("text attention", self.attention, get_args(TextAttention))
        _check_known("text pool", self.pool, get_args(TextPool))
        if self.pool == "mean" and self.attention == "causal":
            raise ValueError("text pool mean needs bidirectional text attention: causal tokens see what precedes them")
        _check_sizes(self, "width", "layers", "heads", "context_length", "vocab_size")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


def _check_known(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def _check_sizes(tower: VisionConfig | TextConfig, *names: str) -> None:
    """Raises ValueError for what a file may say in place of a size."""
    for name in names:
        value = getattr(tower, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, not a whole number above 0")
    ratio: object = tower.mlp_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ValueError(f"mlp_ratio is {ratio!r}, not a number above 0")


@dataclass(frozen=True)
class CLIPConfig:
    """A two-tower model; `embed_dim` is the width of the shared space. Both towers have the same activation.

    init_logit_scale, init_logit_bias: of logits before training, the scale as its logarithm; None: there is no bias
    """

    name: str
    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None

    def __post_init__(self) -> None:
        if self.vision.activation != self.text.activation:
            raise ValueError(f"towers differ: {self.vision.activation} for images, {self.text.activation} for text")

    @property
    def activation(self) -> Activation:
        """What is between the two layers of every MLP."""
        return self.vision.activation

    def with_activation(self, activation: Activation) -> CLIPConfig:
        """The same model with another activation."""
        vision = dataclasses.replace(self.vision, activation=activation)
        return dataclasses.replace(self, vision=vision, text=dataclasses.replace(self.text, activation=activation))

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


# size: embed_dim, vision (width, layers, heads), text (width, layers, heads), as in open_clip, which has S and B with
# patch 32 and 16, L and H with patch 16 and 14; S-14, B-14, L-32 and H-32 are ours, the same sizes at another patch.
_SIZES = {
    "S": (384, (384, 12, 6), (384, 12, 6)),
    "B": (512, (768, 12, 12), (512, 12, 8)),
    "L": (768, (1024, 24, 16), (768, 12, 12)),
    "H": (1024, (1280, 32, 16), (1024, 24, 16)),
}
_CONFIGS = [
    _config(f"ViT-{size}-{patch_size}", embed_dim, (224, patch_size, *vision), text)
    for size, (embed_dim, vision, text) in _SIZES.items()
    for patch_size in (32, 16, 14)
]
# for CPUs
_CONFIGS += [
    _config("ViT-tiny-16", 192, (224, 16, 192, 6, 3), (192, 4, 3)),
    _config("ViT-tiny-8", 192, (64, 8, 192, 6, 3), (192, 4, 3)),
    _config("ViT-nano-8", 128, (64, 8, 128, 4, 4), (128, 3, 4)),
    _config("ViT-test-8", 32, (32, 8, 32, 2, 2), (32, 2, 2)),
]
CONFIGS: dict[str, CLIPConfig] = {config.name: config for config in _CONFIGS}

_QUICK_GELU = "-quickgelu"


def config_from_name(name: str) -> CLIPConfig:
    """The named model's configuration; "-quickgelu" behind a name is the same model with that activation.

    Raises ValueError with the nearest known name.
    """
    stem = name.removesuffix(_QUICK_GELU)
    if stem in CONFIGS:
        config = CONFIGS[stem]
        return config if stem == name else dataclasses.replace(config.with_activation("quick_gelu"), name=name)
    by_lower = {known.lower(): known for known in CONFIGS}
    near = by_lower[difflib.get_close_matches(stem.lower(), by_lower, n=1, cutoff=0.0)[0]] + name[len(stem) :]
    known = ", ".join(CONFIGS)
    raise ValueError(f"unknown model {name!r}: did you mean {near!r}? known: {known}, each also with {_QUICK_GELU}")
