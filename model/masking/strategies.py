"""What to drop, by any strategy: its settings, and one interface to all of them, images in, the patches to keep out.

B images, L patches of an image, T tokens of an image with its class token
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from model.masking.cluster import (
    SIMILARITIES,
    Embed,
    cluster_similarity,
    draw_anchors,
    select_evenly,
    select_with_threshold,
)
from model.masking.pgs import pgs_scores
from model.masking.reference import reference_masks
from model.masking.spatial import block_scores, grid_scores, random_scores
from model.packing import PatchedImages, PatchSelection, keep_all

STRATEGIES = ("none", "random", "cluster", "block", "grid", "pgs", "attentive", "cluster-reference")
SCHEDULES = ("constant", "linear", "cosine")


def _option(default: Any, description: str) -> Any:
    """An option of a recipe's section `masking`: its default, and its meaning for help and docs."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class MaskingConfig:
    """Which patches each step drops (docs/masking.md); raises ValueError for what cannot be."""

    strategy: str = _option("cluster", " | ".join(STRATEGIES))
    target_mask_ratio: float = _option(0.5, "share of the batch's patches that is dropped, exactly")
    min_mask_ratio: float = _option(0.3, "each image loses at least this share (cluster, pgs)")
    max_mask_ratio: float = _option(0.9, "each image loses at most this share (cluster, pgs)")
    anchor_ratio: float = _option(0.03, "share of an image's patches that seed clusters (cluster, pgs)")
    similarity: str = _option("normalized", "what alike means (cluster): " + " | ".join(SIMILARITIES))
    embedding_mix: float = _option(0.0, "weight of patch-embedding similarity at the end (cluster); 0: pixels alone")
    ratio_schedule: str = _option("constant", "target over training: " + " | ".join(SCHEDULES))
    final_mask_ratio: float | None = _option(None, "target at the last step, for another schedule")
    ema_decay: float = _option(0.996, "per step, of the copy whose attention scores patches (attentive)")

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown masking strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")
        if self.ratio_schedule not in SCHEDULES:
            raise ValueError(f"unknown masking.ratio_schedule {self.ratio_schedule!r}; known: {', '.join(SCHEDULES)}")
        for name in ("target_mask_ratio", "min_mask_ratio", "max_mask_ratio", "final_mask_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 <= ratio < 1:
                raise ValueError(f"masking.{name} must be in [0, 1), not {ratio}")
        if self.min_mask_ratio > self.max_mask_ratio:
            raise ValueError(f"min_mask_ratio {self.min_mask_ratio} exceeds max_mask_ratio {self.max_mask_ratio}")
        if (self.final_mask_ratio is None) != (self.ratio_schedule == "constant"):
            raise ValueError("masking.final_mask_ratio and a ratio_schedule other than constant need each other")
        if not 0 < self.anchor_ratio < 1:
            raise ValueError(f"masking.anchor_ratio must be in (0, 1), not {self.anchor_ratio}")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"unknown masking.similarity {self.similarity!r}; known: {', '.join(SIMILARITIES)}")
        if not 0 <= self.embedding_mix <= 1:
            raise ValueError(f"masking.embedding_mix must be in [0, 1], not {self.embedding_mix}")
        if self.embedding_mix and self.strategy != "cluster":
            raise ValueError(f"masking.embedding_mix belongs to the strategy cluster, not {self.strategy}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"masking.ema_decay must be in [0, 1), not {self.ema_decay}")

    @property
    def is_budget_constant(self) -> bool:
        """Whether as many patches are kept of every batch of a size, so that shapes never change."""
        is_constant = self.ratio_schedule == "constant" and self.strategy != "cluster-reference"
        return is_constant or self.strategy == "none"

    @property
    def kept_share(self) -> float:
        """Share of patches that are kept, on average over training."""
        if self.strategy == "none":
            return 1.0
        if self.strategy == "cluster-reference":
            return 1 - self.min_mask_ratio  # at most: what it drops is seldom bounded by its threshold
        # linear and cosine schedules both pass through the middle in the middle
        return 1 - (self.mask_ratio(0) + self.mask_ratio(1)) / 2

    def leaves_a_patch(self, num_patches: int) -> bool:
        """Whether there is one for each image at every time, of images of so many patches."""
        if self.strategy in ("none", "cluster-reference"):  # the latter's target is a threshold
            return True
        return (1 - max(self.mask_ratio(0), self.mask_ratio(1))) * num_patches > 1 - 1e-6

    def mask_ratio(self, progress: float) -> float:
        """Target share at `progress` through training, from 0 at the first step to 1 at the last."""
        if self.final_mask_ratio is None:
            return self.target_mask_ratio
        done = progress if self.ratio_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.target_mask_ratio + done * (self.final_mask_ratio - self.target_mask_ratio)


@dataclass(frozen=True)
class Guidance:
    """What some strategies want to know beside the pixels.

    progress: through training, from 0 at the first step to 1 at the last (schedules, embedding_mix)
    embed: the model's patch embeddings (embedding_mix)
    class_attention: how much the class token of a copy of the model looks at each patch, fp32 [B, L] (attentive)
    """

    progress: float = 0.0
    embed: Embed | None = None
    class_attention: Callable[[PatchedImages], Tensor] | None = None


class Masks(NamedTuple):
    """What a strategy decided about one batch; statistics are tensors, so that nobody waits for them.

    threshold: of similarity or score, above which patches are dropped; NaN where all images lose alike
    flat_share: share of patches that show one colour; NaN where the strategy does not look at pixels
    visible_BT: tokens whose pairs get a bonus in attention, bool [B, T]; of `cluster-reference` alone
    """

    selection: PatchSelection
    threshold: Tensor
    flat_share: Tensor
    visible_BT: Tensor | None = None


@torch.no_grad()
def choose_patches(
    images: PatchedImages, config: MaskingConfig, generator: Generator, guidance: Guidance | None = None
) -> Masks:
    """The configured strategy on one batch; `generator` lives on the device of the images.

    All strategies but `none` and `cluster-reference` keep exactly round((1 - mask ratio) * B * L) patches of the batch.
    """
    guidance = guidance or Guidance()
    target = config.mask_ratio(guidance.progress)
    unknown = torch.full((), math.nan, device=images.device)
    if config.strategy == "none" or target == 0:
        return Masks(keep_all(images.num_images, images.num_patches, images.device), unknown, unknown)
    if config.strategy == "cluster-reference":
        selection, visible_BT = reference_masks(images, target, config.min_mask_ratio, config.anchor_ratio, generator)
        return Masks(selection, torch.full_like(unknown, target), unknown, visible_BT)

    scores_BL, flat_share = _scores(images, config, target, generator, guidance)
    if config.strategy not in ("cluster", "pgs"):  # only these let the content decide how much of an image goes
        return Masks(select_evenly(scores_BL, target, generator), unknown, unknown)
    selection, threshold = select_with_threshold(
        scores_BL, target, config.min_mask_ratio, config.max_mask_ratio, generator
    )
    return Masks(selection, threshold.squeeze(0), unknown if flat_share is None else flat_share)


def _scores(
    images: PatchedImages, config: MaskingConfig, target: float, generator: Generator, guidance: Guidance
) -> tuple[Tensor, Tensor | None]:
    """How soon each patch is dropped, fp32 [B, L], and the share of patches of one colour where it is known."""
    B, grid = images.num_images, images.grid
    match config.strategy:
        case "random":
            return random_scores(B, grid, generator), None
        case "block":
            return block_scores(B, grid, target, generator), None
        case "grid":
            return grid_scores(B, grid, generator), None
        case "pgs":
            return pgs_scores(images, config.anchor_ratio, generator), None
        case "attentive":
            if guidance.class_attention is None:
                raise ValueError("masking.strategy attentive needs a copy of the model to look at the images")
            return -guidance.class_attention(images), None
        case _:
            anchors_BA = draw_anchors(B, images.num_patches, config.anchor_ratio, generator)
            if config.embedding_mix and guidance.embed is None:
                raise ValueError("masking.embedding_mix needs the model's patch embeddings")
            weight = config.embedding_mix * guidance.progress
            return cluster_similarity(images, anchors_BA, config.similarity, guidance.embed, weight)
