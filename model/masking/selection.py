"""Keep exactly as many patches of a batch as the budget says, the least similar ones.

B images, L patches of an image, K patches kept in the whole batch
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from model.packing import lengths_to_cu_seqlens


class PatchSelection(NamedTuple):
    """Patches kept in a batch: kept_K int64 flat indices b * L + l, ascending; cu_seqlens_B1 int32 prefix sums."""

    kept_K: Tensor
    cu_seqlens_B1: Tensor


@torch.no_grad()
def select_patches(
    similarity_BL: Tensor,
    target_mask_ratio: float,
    min_mask_ratio: float,
    max_mask_ratio: float,
    generator: Generator,
) -> PatchSelection:
    """Keep exactly K = round((1 - target_mask_ratio) * B * L) patches of the batch, the least similar ones.

    Of each image at least `min_mask_ratio` and at most `max_mask_ratio` of the patches are dropped (the bounds give way
    where the target lies outside them). The threshold r is the K-th smallest similarity among the patches that the
    bounds leave eligible. An image of which more patches lie under r than it may keep, keeps a uniformly random choice
    of those. Ties are broken at random. No host synchronisation: every shape follows from B, L and the ratios.
    """
    selection, _ = select_with_threshold(similarity_BL, target_mask_ratio, min_mask_ratio, max_mask_ratio, generator)
    return selection


@torch.no_grad()
def select_with_threshold(
    similarity_BL: Tensor,
    target_mask_ratio: float,
    min_mask_ratio: float,
    max_mask_ratio: float,
    generator: Generator,
) -> tuple[PatchSelection, Tensor]:
    """`select_patches`, and the threshold r as an fp32 tensor [1]; NaN if the bounds decide everything."""
    B, L = similarity_BL.shape
    K = round((1 - target_mask_ratio) * B * L)
    most = max(_patches_left(min_mask_ratio, L), -(-K // B))
    fewest = min(max(1, _patches_left(max_mask_ratio, L)), K // B)

    similarity_BL = similarity_BL.float()
    key_BL = _random_tie_keys(similarity_BL, generator)
    sorted_BL, order_BL = key_BL.sort(dim=1)

    # The K smallest eligible keys of the whole batch; `fewest` of each image come first whatever their similarity.
    eligible_BE = sorted_BL[:, :most].clone()
    eligible_BE[:, :fewest].fill_(_SMALLEST_KEY)
    winners_K = eligible_BE.flatten().argsort()[:K]
    kept_B = torch.zeros(B, dtype=torch.long, device=key_BL.device)
    kept_B.scatter_add_(0, winners_K // most, torch.ones_like(winners_K))
    last_key = eligible_BE.flatten()[winners_K[-1:]] if K else eligible_BE.new_full((1,), _SMALLEST_KEY)
    threshold = _similarity_of(last_key)

    # An image that keeps as many as it may draws them from all its patches under the threshold.
    column_L = torch.arange(L, device=key_BL.device)
    under_B1 = (_similarity_of(sorted_BL) <= threshold).sum(dim=1, keepdim=True).maximum(kept_B[:, None])
    lottery_BL = torch.rand(B, L, generator=generator, device=key_BL.device).masked_fill(column_L >= under_B1, 2.0)
    lottery_order_BL = order_BL.gather(1, lottery_BL.argsort(dim=1))
    order_BL = torch.where(kept_B[:, None] == most, lottery_order_BL, order_BL)
    keep_BL = torch.zeros(B, L, dtype=torch.bool, device=key_BL.device)
    keep_BL.scatter_(1, order_BL, column_L < kept_B[:, None])
    selection = PatchSelection(_true_indices(keep_BL.flatten(), K), lengths_to_cu_seqlens(kept_B))
    return selection, threshold.masked_fill(threshold.isneginf(), math.nan)


@torch.no_grad()
def select_evenly(scores_BL: Tensor, mask_ratio: float, generator: Generator) -> PatchSelection:
    """Keep the same budget K, those with the lowest scores of each image; images differ by at most one patch.

    Which images keep one more, and which of equal scores stay, is random. Scores are compared within an image only.
    """
    B, L = scores_BL.shape
    K = round((1 - mask_ratio) * B * L)
    turn_B = torch.rand(B, generator=generator, device=scores_BL.device).argsort()
    kept_B = K // B + (turn_B < K % B).long()
    order_BL = _random_tie_keys(scores_BL.float(), generator).argsort(dim=1)
    keep_BL = torch.zeros(B, L, dtype=torch.bool, device=scores_BL.device)
    keep_BL.scatter_(1, order_BL, torch.arange(L, device=scores_BL.device) < kept_B[:, None])
    return PatchSelection(_true_indices(keep_BL.flatten(), K), lengths_to_cu_seqlens(kept_B))


_SMALLEST_KEY = -(1 << 62)
_TIE_BITS = 31


def _random_tie_keys(similarity: Tensor, generator: Generator) -> Tensor:
    """int64 keys that sort like fp32 similarities, equal ones in random order: their bits, then 31 random bits."""
    bits = (similarity + 0.0).view(torch.int32)  # minus zero becomes zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats of either sign, in the order of signed integers
    ties = torch.randint(1 << _TIE_BITS, similarity.shape, generator=generator, device=similarity.device)
    return (ordered.long() << _TIE_BITS) | ties


def _similarity_of(key: Tensor) -> Tensor:
    """The similarity in a key; minus infinity for the smallest key."""
    ordered = (key >> _TIE_BITS).int()
    similarity = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return torch.where(key == _SMALLEST_KEY, -torch.inf, similarity)


def _patches_left(mask_ratio: float, num_patches: int) -> int:
    """Whole patches that stay when a share is dropped; 0.9 of 100 leaves 10, whatever 1 - 0.9 is in binary."""
    return int((1 - mask_ratio) * num_patches + 1e-6)


def _true_indices(mask_N: Tensor, count: int) -> Tensor:
    """Ascending indices of the True entries, of which there are `count`: `nonzero` without its synchronisation."""
    slot_N = torch.where(mask_N, mask_N.cumsum(0) - 1, count)
    indices = torch.empty(count + 1, dtype=torch.long, device=mask_N.device)
    return indices.scatter_(0, slot_N, torch.arange(mask_N.numel(), device=mask_N.device))[:count]


def keep_all(num_images: int, num_patches: int, device: torch.device) -> PatchSelection:
    """Nothing dropped."""
    kept_K = torch.arange(num_images * num_patches, device=device)
    cu_seqlens_B1 = torch.arange(num_images + 1, device=device, dtype=torch.int32) * num_patches
    return PatchSelection(kept_K, cu_seqlens_B1)
