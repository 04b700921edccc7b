"""Cluster masking: how much patches resemble random anchors, and exactly as many kept as the budget says.

"Efficient Vision-Language Pre-training by Cluster Masking" (arXiv 2405.08815); docs/masking.md explains each step.

B images, L patches of an image, P values of a patch, A anchors of an image, D width of patch embeddings,
K patches kept in the whole batch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from model.packing import PatchedImages, PatchSelection, lengths_to_cu_seqlens

# A patch is flat, and so has no direction, below this standard deviation (of pixels normalised to about unit
# variance): a single pixel that is one grey level off gives 5e-4 in a patch of 16 x 16.
_FLAT_STD = 1e-4
# Flat patches are the same colour within a third of a grey level (1/255 is about 0.015 after normalisation).
_SAME_COLOUR = 5e-3

# Half a grey level. A patch shows one colour if no channel varies by more (standard deviation); raw, a patch whose
# pixels differ by less from the data's mean colour (root of the mean square) has no direction but that of rounding.
_HALF_A_GREY_LEVEL = 7.5e-3

# What alike means. normalized: the pattern of a patch, zero mean each; raw: its colours, as they differ from the data's
# mean colour.
SIMILARITIES = ("normalized", "raw")

# On a CPU similarities are computed for so many images at a time: their patches stay in the cache, and memory stays
# the same for any batch. Accelerators take as many as keep them busy.
_CPU_SLICE, _DEVICE_SLICE = 8, 1024

Embed = Callable[[Tensor], Tensor]  # normalised patches [b, L, P] -> patch embeddings [b, L, D]


class ClusterSimilarity(NamedTuple):
    """Similarity of every patch to its nearest anchor, fp32 [B, L]; the share of patches of one colour, a scalar."""

    similarity_BL: Tensor
    flat_share: Tensor


def draw_anchors(num_images: int, num_patches: int, anchor_ratio: float, generator: Generator) -> Tensor:
    """Distinct uniformly random anchor patches of each image: int64 [B, A], A = round(anchor_ratio * L), at least 1."""
    noise_BL = torch.rand(num_images, num_patches, generator=generator, device=generator.device)
    return noise_BL.topk(num_anchors(num_patches, anchor_ratio), dim=1, sorted=False).indices


def num_anchors(num_patches: int, anchor_ratio: float) -> int:
    """A."""
    return max(1, round(anchor_ratio * num_patches))


@torch.no_grad()
def anchor_similarity(patches_BLP: Tensor, anchors_BA: Tensor, similarity: str = "normalized") -> Tensor:
    """Similarity of each patch to its nearest anchor: fp32 [B, L] in [-1, 1], the maximum over the anchors."""
    return _nearest(anchor_cosines(patches_BLP, anchors_BA, similarity), anchors_BA)


@torch.no_grad()
def cluster_similarity(
    images: PatchedImages,
    anchors_BA: Tensor,
    similarity: str = "normalized",
    embed: Embed | None = None,
    embedding_weight: float = 0.0,
) -> ClusterSimilarity:
    """`anchor_similarity` of a whole batch, a few images at a time.

    With `embedding_weight` w the cosines are (1 - w) * pixels + w * patch embeddings, the paper's second variant.
    """
    similarities, flat_counts = [], []
    for part in image_slices(images):
        patches_BLP = images.patches(part)
        cosine_BAL = anchor_cosines(patches_BLP, anchors_BA[part], similarity)
        if embed is not None and embedding_weight > 0:
            cosine_BAL = cosine_BAL.lerp(embedding_cosines(embed(patches_BLP), anchors_BA[part]), embedding_weight)
        similarities.append(_nearest(cosine_BAL, anchors_BA[part]))
        flat_counts.append(of_one_colour(patches_BLP, images.images_BCHW.shape[1]).sum())
    similarity_BL = torch.cat(similarities)
    return ClusterSimilarity(similarity_BL, torch.stack(flat_counts).sum() / similarity_BL.numel())


def of_one_colour(patches_BLP: Tensor, channels: int) -> Tensor:
    """Which patches show one colour, within half a grey level: bool [B, L]. Borders, letterboxes, blank backgrounds."""
    values_BLCp = patches_BLP.float().unflatten(2, (channels, -1))
    mean_BLC = values_BLCp.mean(dim=3)
    mean_square_BLC = torch.linalg.vector_norm(values_BLCp, dim=3).square() / values_BLCp.shape[3]
    is_one_BLC: Tensor = mean_square_BLC - mean_BLC.square() < _HALF_A_GREY_LEVEL**2
    return is_one_BLC.all(dim=2)


def image_slices(images: PatchedImages) -> Iterator[slice]:
    """Slices of the batch of a size that suits the device."""
    size = _CPU_SLICE if images.device.type == "cpu" else _DEVICE_SLICE
    return (slice(first, first + size) for first in range(0, images.num_images, size))


def anchor_cosines(patches_BLP: Tensor, anchors_BA: Tensor, similarity: str = "normalized") -> Tensor:
    """Cosines of all patches to the anchors, fp32 [B, A, L]; never L x L.

    similarity: one of SIMILARITIES; `normalized` takes each patch's mean from it first.

    A flat patch has no direction: it resembles flat anchors of its own colour (1) and nothing else (0). Raw, patches
    of one colour have the direction of that colour, and flat are those of the data's mean colour alone.
    """
    patches_BLP = patches_BLP.float()
    P = patches_BLP.shape[2]
    mean_BL = patches_BLP.mean(dim=2)
    is_raw = similarity == "raw"
    vectors_BLP = patches_BLP if is_raw else patches_BLP - mean_BL[:, :, None]
    flat_below, same_within = (_HALF_A_GREY_LEVEL, math.inf) if is_raw else (_FLAT_STD, _SAME_COLOUR)
    norm_BL = torch.linalg.vector_norm(vectors_BLP, dim=2)
    is_flat_BL = norm_BL < flat_below * P**0.5
    scale_BL = torch.where(is_flat_BL, 0.0, 1.0 / norm_BL.clamp_min(flat_below))
    anchors_BAP = vectors_BLP.take_along_dim(anchors_BA[:, :, None], dim=1)
    scale_BA = scale_BL.take_along_dim(anchors_BA, dim=1)
    with torch.autocast(patches_BLP.device.type, enabled=False):
        cosine_BAL = (anchors_BAP * scale_BA[:, :, None]) @ vectors_BLP.mT * scale_BL[:, None, :]

    mean_BA = mean_BL.take_along_dim(anchors_BA, dim=1)
    both_flat_BAL = is_flat_BL.take_along_dim(anchors_BA, dim=1)[:, :, None] & is_flat_BL[:, None, :]
    same_colour_BAL = (mean_BA[:, :, None] - mean_BL[:, None, :]).abs() < same_within
    cosine_BAL = torch.where(both_flat_BAL, same_colour_BAL.float(), cosine_BAL)
    return cosine_BAL.clamp(-1, 1)


def embedding_cosines(embeddings_BLD: Tensor, anchors_BA: Tensor) -> Tensor:
    """Cosines between patch embeddings, fp32 [B, A, L]."""
    directions_BLD = torch.nn.functional.normalize(embeddings_BLD.float(), dim=2)
    with torch.autocast(embeddings_BLD.device.type, enabled=False):
        return directions_BLD.take_along_dim(anchors_BA[:, :, None], dim=1) @ directions_BLD.mT


def _nearest(cosine_BAL: Tensor, anchors_BA: Tensor) -> Tensor:
    """The maximum over the anchors; an anchor is its own cluster whatever rounding says."""
    return cosine_BAL.amax(dim=1).scatter(1, anchors_BA, 1.0)


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
