"""One interface to all strategies: images in, the patches to keep out.

B images, L patches of an image, T tokens of an image with its class token
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from model.masking.cluster import Embed, cluster_similarity, draw_anchors
from model.masking.config import MaskingConfig
from model.masking.pgs import pgs_scores
from model.masking.reference import reference_masks
from model.masking.selection import PatchSelection, keep_all, select_evenly, select_with_threshold
from model.masking.spatial import block_scores, grid_scores, random_scores
from model.patches import PatchedImages


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
            return cluster_similarity(images, anchors_BA, guidance.embed, weight)
