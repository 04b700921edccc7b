"""What the released cluster-masking code computes, for comparison with it and with published figures only.

It differs from its paper: the target *ratio* serves as similarity *threshold*; every image keeps the same number of
patches, at most 1 - min_mask_ratio, visible ones first in an order that depends on the position; and instead of hiding
the masked ones among them, attention adds 1 to the logits of pairs that are both visible, by the masks of other images.
Source: https://github.com/Zi-hao-Wei/Efficient-Vision-Language-Pre-training-by-Cluster-Masking, transformer.py.

B images, L patches of an image, A anchors, k patches kept of each image, T = k + 1 tokens, H heads
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from model.masking.cluster import cluster_similarity, draw_anchors
from model.packing import PatchedImages, PatchSelection, lengths_to_cu_seqlens


class ReferenceMasks(NamedTuple):
    """The kept patches, and which tokens of each image its mask calls visible, bool [B, T], class token first.

    Within an image patches are in the order of `argsort`, not ascending: masks are applied to other images by place.
    """

    selection: PatchSelection
    visible_BT: Tensor


@torch.no_grad()
def reference_masks(
    images: PatchedImages, threshold: float, min_mask_ratio: float, anchor_ratio: float, generator: Generator
) -> ReferenceMasks:
    """Patches and visibility as the released code draws them. Waits for the device to learn how many are kept."""
    B, L = images.num_images, images.num_patches
    anchors_BA = draw_anchors(B, L, anchor_ratio, generator)
    is_masked_BL = cluster_similarity(images, anchors_BA).similarity_BL > threshold
    most_visible = L - int(is_masked_BL.sum(dim=1).min())
    k = min(int(L * (1 - min_mask_ratio)), most_visible)
    noise_BL = torch.rand(B, L, generator=generator, device=images.device).exp()
    # visible patches all have 0: which of them comes first is up to argsort
    order_Bk = (noise_BL * is_masked_BL).argsort(dim=1)[:, :k]
    flat_K = (order_Bk + L * torch.arange(B, device=images.device)[:, None]).flatten()
    selection = PatchSelection(flat_K, lengths_to_cu_seqlens(torch.full((B,), k, device=images.device)))
    visible_Bk = ~is_masked_BL.gather(1, order_Bk)
    return ReferenceMasks(selection, torch.cat((visible_Bk.new_ones(B, 1), visible_Bk), dim=1))


def reference_bias(visible_BT: Tensor, heads: int) -> Tensor:
    """What the released code adds to the attention logits: fp32 [B, H, T, T], 1 where both tokens are visible, else 0.

    Head h of image b gets the mask of image (b * H + h) mod B: masks are laid out by heads, and read by images.
    """
    B = visible_BT.shape[0]
    source_BH = torch.arange(B * heads, device=visible_BT.device).view(B, heads) % B
    visible_BHT = visible_BT.float()[source_BH]
    return visible_BHT[:, :, :, None] * visible_BHT[:, :, None, :]
