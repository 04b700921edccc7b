"""What a strategy drops of a batch of images, and the clusters by which it came to it.

B images, L patches of an image, A anchors of an image
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from model.masking import Guidance, MaskingConfig, PatchedImages, choose_patches, draw_anchors
from model.masking.cluster import anchor_cosines, embedding_cosines
from model.masking.pgs import balance, draw_candidates, edge_strength
from pipeline.training.mask_drawer import seed_masks


@dataclass(frozen=True)
class Clusters:
    """Patches by their nearest anchor.

    anchors_BA: int64, the patches that seed clusters
    nearest_BL: int64 in [0, A), the anchor that each patch resembles most
    similarity_BL: fp32, how much it does; the anchors themselves have 1
    edges_BL: edge strength, fp32 in [0, 1], which is taken off the similarity (pgs alone)
    """

    anchors_BA: Tensor
    nearest_BL: Tensor
    similarity_BL: Tensor
    edges_BL: Tensor | None = None

    @property
    def score_BL(self) -> Tensor:
        """The higher, the sooner dropped."""
        return self.similarity_BL if self.edges_BL is None else self.similarity_BL - self.edges_BL


@dataclass(frozen=True)
class Anatomy:
    """Masks of one batch: dropped_BL (bool), the statistics that training logs, clusters where there are any.

    threshold: of similarity or score, above which patches are dropped; NaN where there is none
    flat_share: share of patches that show one colour; NaN where the strategy does not look
    """

    dropped_BL: Tensor
    threshold: float
    flat_share: float
    clusters: Clusters | None

    @property
    def mask_ratio_B(self) -> Tensor:
        """Share of each image's patches that is dropped."""
        return self.dropped_BL.float().mean(dim=1)


def dissect(images: PatchedImages, masking: MaskingConfig, seed: int, guidance: Guidance | None = None) -> Anatomy:
    """Mask a batch as the first micro-batch of a run with this seed would be."""
    guidance = guidance or Guidance()
    masks = choose_patches(images, masking, _generator(images, seed), guidance)
    dropped_N = torch.ones(images.num_images * images.num_patches, dtype=torch.bool, device=images.device)
    dropped_N[masks.selection.kept_K] = False
    return Anatomy(
        dropped_BL=dropped_N.view(images.num_images, images.num_patches),
        threshold=masks.threshold.item(),
        flat_share=masks.flat_share.item(),
        clusters=_clusters(images, masking, _generator(images, seed), guidance),
    )


def _generator(images: PatchedImages, seed: int) -> Generator:
    generator = Generator(device=images.device)
    seed_masks(generator, seed, step=0, micro_batch=0, rank=0)
    return generator


def _clusters(
    images: PatchedImages, masking: MaskingConfig, generator: Generator, guidance: Guidance
) -> Clusters | None:
    """The clusters that the strategy saw: anchors are the first thing it takes from its generator."""
    if masking.strategy == "pgs":
        return _pgs_clusters(images, masking.anchor_ratio, generator)
    if masking.strategy not in ("cluster", "cluster-reference"):
        return None
    anchors_BA = draw_anchors(images.num_images, images.num_patches, masking.anchor_ratio, generator)
    patches_BLP = images.patches()
    is_raw = masking.strategy == "cluster" and masking.similarity == "raw"
    cosine_BAL = anchor_cosines(patches_BLP, anchors_BA, "raw" if is_raw else "normalized")
    weight = masking.embedding_mix * guidance.progress
    if guidance.embed is not None and weight > 0:
        cosine_BAL = cosine_BAL.lerp(embedding_cosines(guidance.embed(patches_BLP), anchors_BA), weight)
    return _by_nearest(cosine_BAL, anchors_BA)


def _pgs_clusters(images: PatchedImages, candidate_ratio: float, generator: Generator) -> Clusters:
    noise_BL = torch.rand(images.num_images, images.num_patches, generator=generator, device=images.device)
    edges_BL = edge_strength(images.normalized(), images.patch_size)
    candidates_BA = draw_candidates(edges_BL, candidate_ratio, noise_BL)
    return _by_nearest(balance(anchor_cosines(images.patches(), candidates_BA)), candidates_BA, edges_BL)


def _by_nearest(similarity_BAL: Tensor, anchors_BA: Tensor, edges_BL: Tensor | None = None) -> Clusters:
    similarity_BL, nearest_BL = similarity_BAL.max(dim=1)
    own_BA = torch.arange(anchors_BA.shape[1], device=anchors_BA.device).expand_as(anchors_BA)
    nearest_BL, similarity_BL = nearest_BL.scatter(1, anchors_BA, own_BA), similarity_BL.scatter(1, anchors_BA, 1.0)
    return Clusters(anchors_BA, nearest_BL, similarity_BL, edges_BL)
