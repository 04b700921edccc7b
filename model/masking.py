"""Which patches of each image are kept: none dropped, random (FLIP), or clusters of similar patches.

Exact-budget cluster masking after "Efficient Vision-Language Pre-training by Cluster Masking" (arXiv 2405.08815):
patches similar to a few random anchors are dropped, and the similarity threshold is chosen per batch so that exactly
`round((1 - target_mask_ratio) * B * L)` patches stay. docs/masking.md explains each step.

B images, L patches of an image, P values of a patch, A anchors of an image, K patches kept in the whole batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from model.packing import lengths_to_cu_seqlens

STRATEGIES = ("none", "random", "cluster")

# A patch is flat, and so has no direction, below this standard deviation (of pixels normalised to about unit
# variance): a single pixel that is one grey level off gives 5e-4 in a patch of 16 x 16.
_FLAT_STD = 1e-4
# Flat patches are the same colour within a third of a grey level (1/255 is about 0.015 after normalisation).
_SAME_COLOUR = 5e-3


@dataclass(frozen=True)
class MaskingConfig:
    """What to drop: target share of the batch, bounds on each image's share, share of patches that are anchors."""

    strategy: str = "cluster"
    target_mask_ratio: float = 0.5
    min_mask_ratio: float = 0.3
    max_mask_ratio: float = 0.9
    anchor_ratio: float = 0.03

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown masking strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")
        for name in ("target_mask_ratio", "min_mask_ratio", "max_mask_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"masking.{name} must be in [0, 1), not {getattr(self, name)}")
        if not 0 < self.anchor_ratio < 1:
            raise ValueError(f"masking.anchor_ratio must be in (0, 1), not {self.anchor_ratio}")


class PatchSelection(NamedTuple):
    """Patches kept in a batch: kept_K int64 flat indices b * L + l, ascending; cu_seqlens_B1 int32 prefix sums."""

    kept_K: Tensor
    cu_seqlens_B1: Tensor


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, [B, C, H, W] -> [B, L, P] with P = C * patch_size**2 in (channel, row, column) order.

    Raises ValueError if the image is not a whole number of patches high and wide.
    """
    B, C, H, W = images_BCHW.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"an image of {H} x {W} pixels cannot be cut into patches of {patch_size}")
    grid = images_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch_size**2)


def draw_anchors(num_images: int, num_patches: int, anchor_ratio: float, generator: Generator) -> Tensor:
    """Distinct uniformly random anchor patches of each image: int64 [B, A], A = round(anchor_ratio * L), at least 1."""
    num_anchors = max(1, round(anchor_ratio * num_patches))
    noise_BL = torch.rand(num_images, num_patches, generator=generator, device=generator.device)
    return noise_BL.topk(num_anchors, dim=1, sorted=False).indices


@torch.no_grad()
def anchor_similarity(patches_BLP: Tensor, anchors_BA: Tensor) -> Tensor:
    """Similarity of each patch to its nearest anchor: fp32 [B, L] in [-1, 1], the maximum over the anchors.

    The cosine between patches that are each normalised to zero mean; A x L products, never L x L. Only the anchors
    are centred: a zero-mean anchor takes the other patch's mean out of the product by itself. A flat patch has no
    direction: it resembles flat anchors of its own colour (1) and nothing else (0).
    """
    patches_BLP = patches_BLP.float()
    std_BL, mean_BL = torch.std_mean(patches_BLP, dim=2, correction=0)
    is_flat_BL = std_BL < _FLAT_STD
    anchors_BAP = patches_BLP.take_along_dim(anchors_BA[:, :, None], dim=1)
    mean_BA = mean_BL.take_along_dim(anchors_BA, dim=1)
    centred_BAP = anchors_BAP - mean_BA[:, :, None]
    # once more: what rounding left of the mean would count for much where contrast is low
    centred_BAP = centred_BAP - centred_BAP.mean(dim=2, keepdim=True)
    num_values = patches_BLP.shape[2]
    scale_BL = torch.where(is_flat_BL, 0.0, 1.0 / std_BL.clamp_min(_FLAT_STD))
    scale_BA = scale_BL.take_along_dim(anchors_BA, dim=1) / num_values
    cosine_BAL = (centred_BAP * scale_BA[:, :, None]) @ patches_BLP.mT * scale_BL[:, None, :]

    both_flat_BAL = is_flat_BL.take_along_dim(anchors_BA, dim=1)[:, :, None] & is_flat_BL[:, None, :]
    same_colour_BAL = (mean_BA[:, :, None] - mean_BL[:, None, :]).abs() < _SAME_COLOUR
    cosine_BAL = torch.where(both_flat_BAL, same_colour_BAL.float(), cosine_BAL)
    similarity_BL = cosine_BAL.amax(dim=1).clamp(-1, 1)
    return similarity_BL.scatter(1, anchors_BA, 1.0)


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
    B, L = similarity_BL.shape
    device = similarity_BL.device
    K = round((1 - target_mask_ratio) * B * L)
    most = max(_patches_left(min_mask_ratio, L), -(-K // B))
    fewest = min(max(1, _patches_left(max_mask_ratio, L)), K // B)

    # Each row in ascending order of similarity; the shuffle beforehand makes the stable sort break ties at random.
    shuffle_BL = torch.rand(B, L, generator=generator, device=device).argsort(dim=1)
    sorted_BL, rank_BL = similarity_BL.float().gather(1, shuffle_BL).sort(dim=1, stable=True)
    order_BL = shuffle_BL.gather(1, rank_BL)

    # The K smallest eligible similarities of the whole batch, ties again in random order.
    eligible_BE = sorted_BL[:, :most].clone()
    eligible_BE[:, :fewest] = -torch.inf
    shuffle_BE = torch.rand(B * most, generator=generator, device=device).argsort()
    winners_K = shuffle_BE[eligible_BE.flatten()[shuffle_BE].argsort(stable=True)[:K]]
    kept_B = torch.zeros(B, dtype=torch.long, device=device)
    kept_B.scatter_add_(0, winners_K // most, torch.ones_like(winners_K))
    threshold = eligible_BE.flatten()[winners_K[-1:]] if K else sorted_BL.new_full((1,), -torch.inf)

    # An image that keeps as many as it may draws them from all its patches under the threshold.
    under_B1 = (sorted_BL <= threshold).sum(dim=1, keepdim=True).maximum(kept_B[:, None])
    column_L = torch.arange(L, device=device)
    lottery_BL = torch.rand(B, L, generator=generator, device=device).masked_fill(column_L >= under_B1, 2.0)
    lottery_rank_BL = lottery_BL.argsort(dim=1).argsort(dim=1)
    is_full_B1 = kept_B[:, None] == most
    rank_BL = torch.where(is_full_B1, lottery_rank_BL, column_L)
    keep_BL = torch.zeros(B, L, dtype=torch.bool, device=device).scatter_(1, order_BL, rank_BL < kept_B[:, None])
    return PatchSelection(_true_indices(keep_BL.flatten(), K), lengths_to_cu_seqlens(kept_B))


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


@torch.no_grad()
def choose_patches(patches_BLP: Tensor, config: MaskingConfig, generator: Generator) -> PatchSelection:
    """The configured strategy on one batch; `generator` lives on the device of the patches.

    `random` has the same exact budget as `cluster`, spread evenly: images differ by one patch at most.
    """
    B, L, _ = patches_BLP.shape
    target = config.target_mask_ratio
    if config.strategy == "none" or target == 0:
        return keep_all(B, L, patches_BLP.device)
    if config.strategy == "random":
        noise_BL = torch.rand(B, L, generator=generator, device=patches_BLP.device)
        return select_patches(noise_BL, target, target, target, generator)
    anchors_BA = draw_anchors(B, L, config.anchor_ratio, generator)
    similarity_BL = anchor_similarity(patches_BLP, anchors_BA)
    return select_patches(similarity_BL, target, config.min_mask_ratio, config.max_mask_ratio, generator)
