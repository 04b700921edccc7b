"""Ways to choose patches that are tried in studies alone, and what may be done with the dropped ones.

Clusters are of colour and place: a patch is the mean colour of its quarters and where it lies. Of every image the same
number of patches stays.

balanced        around a quarter of the patches; a cluster of n keeps about n^alpha (DynamiCS's rule within an image)
representative  random patches stay, each for those that it resembles most: the more they are, the more it is looked at
merge           likewise, and it is the mean of their pixels

B images, L patches of an image, A anchors, S patches kept of each image, P values of a patch, F features of a patch,
T = S + 1 tokens, H heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Generator, Tensor

from model.masking import Guidance, MaskingConfig, Masks, PatchedImages, draw_anchors
from model.masking.cluster import select_evenly
from model.masking.spatial import random_scores
from pipeline.training.mask_drawer import MaskDrawer

_CLUSTERS_SHARE = 0.25
# Opposite borders of an image are as far apart as two colours that differ by twice the data's standard deviation.
_PLACE_WEIGHT = 2.0


class Choice(NamedTuple):
    """Masks, and for each kept patch the patches that it stands for.

    log_size_BS: logarithm of how many; None where attention does not know
    mean_BSL: weights with which patches are averaged into kept ones; None where they are not
    """

    masks: Masks
    log_size_BS: Tensor | None = None
    mean_BSL: Tensor | None = None


Choose = Callable[[PatchedImages, float, Generator], Choice]


def colour_and_place(images: PatchedImages) -> Tensor:
    """Features [B, L, F]: mean colour of each quarter of a patch, and its row and column."""
    rows, columns = images.grid
    half = images.patch_size // 2
    quarters = torch.nn.functional.avg_pool2d(images.normalized(), half)  # [B, 3, 2 rows, 2 columns]
    colour_BLF = torch.nn.functional.unfold(quarters, 2, stride=2).mT / 2
    row_L, column_L = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    place_L2 = _PLACE_WEIGHT * torch.stack((row_L.flatten(), column_L.flatten()), dim=1)
    return torch.cat((colour_BLF, place_L2.expand(images.num_images, -1, -1)), dim=2)


def balanced(images: PatchedImages, ratio: float, generator: Generator, alpha: float, is_weighted: bool) -> Choice:
    """Of a cluster of n patches about n^alpha stay, its patches in random order: Sainte-Lague's apportionment."""
    features_BLF = colour_and_place(images)
    anchors_BA = draw_anchors(images.num_images, images.num_patches, _CLUSTERS_SHARE, generator)
    anchors_BAF = features_BLF.take_along_dim(anchors_BA[:, :, None], dim=1)
    cluster_BL = torch.cdist(anchors_BAF, features_BLF).argmin(dim=1)
    size_BL = _count(cluster_BL, cluster_BL)
    place_BL = _rank_within(cluster_BL, torch.rand(cluster_BL.shape, generator=generator))
    masks = _evenly((place_BL + 0.5) / size_BL**alpha, ratio, generator)
    if not is_weighted:
        return Choice(masks)
    kept_BS = _kept(masks, images.num_patches)
    cluster_BS = cluster_BL.gather(1, kept_BS)
    return Choice(masks, (size_BL.gather(1, kept_BS) / _count(cluster_BS, cluster_BS)).log())


def representative(images: PatchedImages, ratio: float, generator: Generator, is_merged: bool) -> Choice:
    """Random patches stay; every dropped one belongs to the kept one that is nearest in colour and place."""
    masks = _evenly(random_scores(images.num_images, images.grid, generator), ratio, generator)
    kept_BS = _kept(masks, images.num_patches)
    features_BLF = colour_and_place(images)
    kept_BSF = features_BLF.take_along_dim(kept_BS[:, :, None], dim=1)
    nearest_BL = torch.cdist(kept_BSF, features_BLF).argmin(dim=1)
    belongs_BSL = (nearest_BL[:, None] == torch.arange(kept_BS.shape[1])[:, None]).float()
    size_BS = belongs_BSL.sum(dim=2).clamp_min(1)
    return Choice(masks, size_BS.log(), belongs_BSL / size_BS[:, :, None] if is_merged else None)


def _evenly(scores_BL: Tensor, ratio: float, generator: Generator) -> Masks:
    unknown = torch.full((), math.nan)
    return Masks(select_evenly(scores_BL, ratio, generator), unknown, unknown)


def _kept(masks: Masks, num_patches: int) -> Tensor:
    """Indices within each image [B, S]; raises RuntimeError if images keep unequal numbers."""
    return (masks.selection.kept_K % num_patches).unflatten(0, (masks.selection.cu_seqlens_B1.numel() - 1, -1))


def _count(cluster_BL: Tensor, of_BX: Tensor) -> Tensor:
    """How many of each image's patches are of the same cluster: [B, X]."""
    return (of_BX[:, :, None] == cluster_BL[:, None, :]).sum(dim=2)


def _rank_within(cluster_BL: Tensor, noise_BL: Tensor) -> Tensor:
    """How many patches of its own cluster come before each: [B, L]."""
    same_BLL = cluster_BL[:, :, None] == cluster_BL[:, None, :]
    return (same_BLL & (noise_BL[:, None, :] < noise_BL[:, :, None])).sum(dim=2)


EXPERIMENTS: dict[str, Choose] = {
    "balanced": lambda *batch: balanced(*batch, alpha=0.2, is_weighted=False),
    "balanced weighted": lambda *batch: balanced(*batch, alpha=0.2, is_weighted=True),
    "stratified": lambda *batch: balanced(*batch, alpha=1.0, is_weighted=False),
    "k-centre": lambda *batch: balanced(*batch, alpha=0.0, is_weighted=False),
    "representative": lambda *batch: representative(*batch, is_merged=False),
    "merge": lambda *batch: representative(*batch, is_merged=True),
}


@dataclass(frozen=True)
class MergedImages(PatchedImages):
    """Images whose kept patches are means; `gather` is all that training asks of them."""

    mean_BSL: Tensor

    def gather(self, kept_K: Tensor) -> Tensor:
        """[K, P]."""
        return (self.mean_BSL @ self.patches()).flatten(0, 1)


@contextmanager
def trying(experiment: str | None) -> Iterator[None]:
    """Training within chooses patches as the experiment says, at the ratio of the recipe's masking (random)."""
    if experiment is None:
        yield
        return
    choose, chosen = EXPERIMENTS[experiment], []
    draw = MaskDrawer.draw

    def choose_patches(
        images: PatchedImages, config: MaskingConfig, generator: Generator, guidance: Guidance | None = None
    ) -> Masks:
        choice = choose(images, config.target_mask_ratio, generator)
        chosen[:] = [choice]
        if choice.log_size_BS is None:
            return choice.masks
        # the way into attention that `cluster-reference` has: read by `bias_of_sizes`
        class_B1 = choice.log_size_BS.new_zeros(images.num_images, 1)
        return choice.masks._replace(visible_BT=torch.cat((class_B1, choice.log_size_BS), dim=1))

    def draw_and_merge(self: MaskDrawer, *batch: Any) -> tuple[PatchedImages, Masks]:
        images, masks = draw(self, *batch)
        mean_BSL = chosen[0].mean_BSL
        return images if mean_BSL is None else MergedImages(images.images_BCHW, images.patch_size, mean_BSL), masks

    with (
        mock.patch("pipeline.training.mask_drawer.choose_patches", choose_patches),
        mock.patch("model.towers.reference_bias", bias_of_sizes),
        mock.patch.object(MaskDrawer, "draw", draw_and_merge),
    ):
        yield


def bias_of_sizes(log_size_BT: Tensor, heads: int) -> Tensor:
    """Proportional attention (ToMe, arXiv 2210.09461): every query adds a key's logarithm of size, [B, H, T, T]."""
    return log_size_BT[:, None, None, :].expand(-1, heads, log_size_BT.shape[1], -1).float()
