"""Clusters of similar patches: how much each patch resembles a few random anchors.

"Efficient Vision-Language Pre-training by Cluster Masking" (arXiv 2405.08815); docs/masking.md explains each step.

B images, L patches of an image, P values of a patch, A anchors of an image, D width of patch embeddings
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from model.patches import PatchedImages

# A patch is flat, and so has no direction, below this standard deviation (of pixels normalised to about unit
# variance): a single pixel that is one grey level off gives 5e-4 in a patch of 16 x 16.
_FLAT_STD = 1e-4
# Flat patches are the same colour within a third of a grey level (1/255 is about 0.015 after normalisation).
_SAME_COLOUR = 5e-3

# A patch shows one colour if no channel varies by more than half a grey level (standard deviation; a grey level is
# about 0.015 after normalisation).
_ONE_COLOUR_STD = 7.5e-3

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
def anchor_similarity(patches_BLP: Tensor, anchors_BA: Tensor) -> Tensor:
    """Similarity of each patch to its nearest anchor: fp32 [B, L] in [-1, 1], the maximum over the anchors."""
    return _nearest(anchor_cosines(patches_BLP, anchors_BA), anchors_BA)


@torch.no_grad()
def cluster_similarity(
    images: PatchedImages, anchors_BA: Tensor, embed: Embed | None = None, embedding_weight: float = 0.0
) -> ClusterSimilarity:
    """`anchor_similarity` of a whole batch, a few images at a time.

    With `embedding_weight` w the cosines are (1 - w) * pixels + w * patch embeddings, the paper's second variant.
    """
    similarities, flat_counts = [], []
    for part in image_slices(images):
        patches_BLP = images.patches(part)
        cosine_BAL = anchor_cosines(patches_BLP, anchors_BA[part])
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
    is_one_BLC: Tensor = mean_square_BLC - mean_BLC.square() < _ONE_COLOUR_STD**2
    return is_one_BLC.all(dim=2)


def image_slices(images: PatchedImages) -> Iterator[slice]:
    """Slices of the batch of a size that suits the device."""
    size = _CPU_SLICE if images.device.type == "cpu" else _DEVICE_SLICE
    return (slice(first, first + size) for first in range(0, images.num_images, size))


def anchor_cosines(patches_BLP: Tensor, anchors_BA: Tensor) -> Tensor:
    """Cosines of all patches to the anchors, fp32 [B, A, L], each patch normalised to zero mean. Never L x L.

    A flat patch has no direction: it resembles flat anchors of its own colour (1) and nothing else (0).
    """
    patches_BLP = patches_BLP.float()
    P = patches_BLP.shape[2]
    mean_BL = patches_BLP.mean(dim=2)
    centred_BLP = patches_BLP - mean_BL[:, :, None]
    norm_BL = torch.linalg.vector_norm(centred_BLP, dim=2)
    is_flat_BL = norm_BL < _FLAT_STD * P**0.5
    scale_BL = torch.where(is_flat_BL, 0.0, 1.0 / norm_BL.clamp_min(_FLAT_STD))
    anchors_BAP = centred_BLP.take_along_dim(anchors_BA[:, :, None], dim=1)
    scale_BA = scale_BL.take_along_dim(anchors_BA, dim=1)
    with torch.autocast(patches_BLP.device.type, enabled=False):
        cosine_BAL = (anchors_BAP * scale_BA[:, :, None]) @ centred_BLP.mT * scale_BL[:, None, :]

    mean_BA = mean_BL.take_along_dim(anchors_BA, dim=1)
    both_flat_BAL = is_flat_BL.take_along_dim(anchors_BA, dim=1)[:, :, None] & is_flat_BL[:, None, :]
    same_colour_BAL = (mean_BA[:, :, None] - mean_BL[:, None, :]).abs() < _SAME_COLOUR
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
