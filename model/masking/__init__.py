"""Which patches of each image are kept (docs/masking.md).

strategies   what to drop, and how the share changes during training; one interface to all: `choose_patches`
cluster      similarity to random anchors (the paper), and exactly as many patches as the budget says
spatial      random, block, grid
pgs          edges, candidates, balanced similarities (CLIP-PGS)
reference    what the released cluster-masking code computes
"""

from model.masking.cluster import anchor_similarity, draw_anchors, select_patches
from model.masking.strategies import STRATEGIES, Guidance, MaskingConfig, Masks, choose_patches
from model.packing import PatchedImages, PatchSelection, keep_all, patchify

__all__ = [
    "STRATEGIES",
    "Guidance",
    "MaskingConfig",
    "Masks",
    "PatchSelection",
    "PatchedImages",
    "anchor_similarity",
    "choose_patches",
    "draw_anchors",
    "keep_all",
    "patchify",
    "select_patches",
]
