"""CLIP-PGS, "Seeing What Matters" (Pei et al., arXiv 2503.17080, CVPR 2025), as its text describes it.

From candidates to a mask in three steps: a few candidate patches are drawn away from edges; edges of the real image
protect the objects; patches similar to the candidates go, by similarities that optimal transport has balanced. The
released code computes the edges on per-patch-normalised patch means, which is noise, and takes the patches with the
strongest edges as candidates; docs/masking.md lists where this differs.

B images, C, H, W an image, L patches of an image, A candidates of an image, p patch size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from model.masking.cluster import anchor_cosines, image_slices, num_anchors
from model.packing import PatchedImages

# Weights of red, green and blue in brightness (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)
# Entropic regularisation of the transport: similarities that differ by this much differ by a factor e in the plan.
_TEMPERATURE = 0.1
# Column and row scalings: on photographs a column's mass is then 0.04 % off on average, 3 % at most (after ten 2 and
# 34 %), in 40 us an image on a CPU.
_SINKHORN_ITERATIONS = 50


@torch.no_grad()
def pgs_scores(images: PatchedImages, candidate_ratio: float, generator: Generator) -> Tensor:
    """How soon each patch is dropped: balanced similarity to the nearest candidate, minus edge strength. fp32 [B, L].

    Both terms are in [0, 1].
    """
    B, L = images.num_images, images.num_patches
    noise_BL = torch.rand(B, L, generator=generator, device=generator.device)
    scores = []
    for part in image_slices(images):
        edges_BL = edge_strength(images.normalized(part), images.patch_size)
        candidates_BA = draw_candidates(edges_BL, candidate_ratio, noise_BL[part])
        cosine_BAL = anchor_cosines(images.patches(part), candidates_BA)
        similarity_BL = balance(cosine_BAL).amax(dim=1).scatter(1, candidates_BA, 1.0)
        scores.append(similarity_BL - edges_BL)
    return torch.cat(scores)


def edge_strength(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Mean Sobel gradient of brightness in each patch, from 0 to 1 within each image: fp32 [B, L].

    An image without edges has 0 everywhere.
    """
    red_BHW, green_BHW, blue_BHW = images_BCHW.float().unbind(1)
    grey_BHW = _LUMA[0] * red_BHW + _LUMA[1] * green_BHW + _LUMA[2] * blue_BHW
    # repeated at the border, so that the frame of an image is no edge
    padded_BHW = F.pad(grey_BHW, (1, 1, 1, 1), mode="replicate")
    magnitude_BHW = torch.hypot(_slope(_smooth(padded_BHW, 1), 2), _slope(_smooth(padded_BHW, 2), 1))
    strength_BL = F.avg_pool2d(magnitude_BHW, patch_size).flatten(1)
    lowest_B1, highest_B1 = strength_BL.aminmax(dim=1, keepdim=True)
    return (strength_BL - lowest_B1) / (highest_B1 - lowest_B1).clamp_min(1e-6)


def _smooth(x_BHW: Tensor, dim: int) -> Tensor:
    """Across Sobel's kernel: (1, 2, 1) / 4, a row or column shorter at either end."""
    inner = x_BHW.shape[dim] - 2
    return (x_BHW.narrow(dim, 0, inner) + 2 * x_BHW.narrow(dim, 1, inner) + x_BHW.narrow(dim, 2, inner)) / 4


def _slope(x_BHW: Tensor, dim: int) -> Tensor:
    """Along it: (-1, 0, 1) / 2, likewise shorter."""
    inner = x_BHW.shape[dim] - 2
    return (x_BHW.narrow(dim, 2, inner) - x_BHW.narrow(dim, 0, inner)) / 2


def draw_candidates(edges_BL: Tensor, candidate_ratio: float, noise_BL: Tensor) -> Tensor:
    """Candidate patches, int64 [B, A]: drawn without replacement with weights 1 - edge strength.

    Weighted sampling by keys noise ** (1 / weight) (Efraimidis and Spirakis 2006), `noise_BL` uniform in [0, 1).
    """
    weight_BL = (1 - edges_BL).clamp_min(1e-3)
    key_BL = noise_BL.clamp_min(1e-30).log() / weight_BL
    return key_BL.topk(num_anchors(edges_BL.shape[1], candidate_ratio), dim=1, sorted=False).indices


def balance(cosine_BAL: Tensor) -> Tensor:
    """Similarities after optimal-transport normalisation: in [0, 1], same shape.

    The entropic transport plan between candidates and patches, each side with equal masses (Sinkhorn), averaged with
    the similarity itself; both are scaled to a maximum of 1. A patch that resembles every candidate, as dull ones do,
    counts for less, and no candidate claims the whole image.
    """
    A, L = cosine_BAL.shape[1:]
    plan_BAL = ((cosine_BAL - 1) / _TEMPERATURE).exp()
    for _ in range(_SINKHORN_ITERATIONS):
        plan_BAL = plan_BAL / (plan_BAL.sum(dim=1, keepdim=True) * L)
        plan_BAL = plan_BAL / (plan_BAL.sum(dim=2, keepdim=True) * A)
    plan_BAL = plan_BAL / plan_BAL.amax(dim=(1, 2), keepdim=True)
    return (cosine_BAL.clamp_min(0) + plan_BAL) / 2
