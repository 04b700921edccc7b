"""What mask-preview is to show: strategies, sizes and the model behind them, from a recipe and options over it.

D width of patch embeddings, P values of a patch, L patches of an image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from formats.errors import UserError, nearest_of
from model.class_attention import class_attention
from model.config import config_from_name
from model.masking import STRATEGIES, Guidance, MaskingConfig
from model.towers import VisionTransformer, embed_patches
from pipeline.inference import load_for_inference
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class PreviewSetting:
    """Masking by strategy, sides in pixels, what strategies may look at, and the seed of the masks."""

    maskings: Mapping[str, MaskingConfig]
    patch_size: int
    image_size: int
    guidance: Guidance
    seed: int

    def __str__(self) -> str:
        masking = next(iter(self.maskings.values()))
        target, lowest, highest = (
            f"{100 * share:.0f}"
            for share in (masking.mask_ratio(self.guidance.progress), masking.min_mask_ratio, masking.max_mask_ratio)
        )
        bounds = f" (cluster and pgs: {lowest} to {highest} % of each image)"
        return (
            f"Patches of {self.patch_size} x {self.patch_size} on images of {self.image_size} x {self.image_size}; "
            f"target {target} %{bounds if {'cluster', 'pgs'} & self.maskings.keys() else ''}; seed {self.seed}"
        )


def parse_strategies(listed: str) -> list[str]:
    """Names from a comma-separated list; raises UserError with the nearest name for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",")))
    for name in names:
        if name not in STRATEGIES:
            raise UserError(f"unknown strategy {name!r}{nearest_of(name, STRATEGIES)}")
    return names


def make_setting(
    recipe: Recipe,
    strategies: Sequence[str],
    checkpoint: str | None,
    patch_size: int | None,
    image_size: int | None,
    seed: int | None,
    progress: float,
) -> PreviewSetting:
    """Options that are None are the checkpoint's, else the recipe's, else those of the recipe's model.

    Raises UserError for sizes that do not fit, and for a strategy that needs a checkpoint where there is none.
    """
    visual = None
    if checkpoint:
        visual, patch_size, image_size = _read_tower(checkpoint, patch_size, image_size)
    vision = config_from_name(recipe.model.name).vision
    patch_size = patch_size or vision.patch_size
    image_size = image_size or recipe.model.image_size or vision.image_size
    _check_sizes(patch_size, image_size)
    masking = recipe.masking
    return PreviewSetting(
        maskings={strategy: _under(strategy, masking, visual) for strategy in strategies},
        patch_size=patch_size,
        image_size=image_size,
        guidance=_guidance(visual, progress),
        seed=recipe.train.seed if seed is None else seed,
    )


def _read_tower(checkpoint: str, patch_size: int | None, image_size: int | None) -> tuple[VisionTransformer, int, int]:
    """The image tower of a checkpoint, its patch size and image size; UserError if others are asked for."""
    model = load_for_inference(checkpoint, torch.device("cpu"))
    own_patch_size = model.clip.config.vision.patch_size
    for option, asked, own in (
        ("--patch-size", patch_size, own_patch_size),
        ("--image-size", image_size, model.image_size),
    ):
        if asked not in (None, own):
            raise UserError(f"{model.checkpoint} was trained with {option} {own}, not {asked}: leave the option out")
    return model.clip.visual, own_patch_size, model.image_size


def _check_sizes(patch_size: int, image_size: int) -> None:
    if image_size % patch_size:
        below = image_size // patch_size * patch_size
        fitting = " or ".join(str(size) for size in (below, below + patch_size) if size)
        raise UserError(
            f"images of {image_size} pixels a side are not a whole number of patches of {patch_size}: "
            f"take --image-size {fitting}, or another --patch-size"
        )


def _under(strategy: str, masking: MaskingConfig, visual: VisionTransformer | None) -> MaskingConfig:
    """The recipe's masking under one strategy; UserError if that needs a model and there is none."""
    mix = masking.embedding_mix if strategy == "cluster" else 0.0
    if visual is None and (mix or strategy == "attentive"):
        what = "masking.embedding_mix" if mix else "strategy attentive"
        raise UserError(f"{what} looks at images through a trained model: give --checkpoint RUN")
    return replace(masking, strategy=strategy, embedding_mix=mix)


def _guidance(visual: VisionTransformer | None, progress: float) -> Guidance:
    """What a run with these weights would look at; for `attentive` they stand in for their moving average."""
    if visual is None:
        return Guidance(progress)
    weight_DP, position_LD = visual.patch_embedding.weight.detach(), visual.positional_embedding.detach()[1:]
    return Guidance(
        progress,
        embed=lambda patches_BLP: embed_patches(patches_BLP, weight_DP, position_LD),
        class_attention=lambda images: class_attention(visual, images),
    )
