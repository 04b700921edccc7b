"""The numbers behind the choices that docs/masking.md explains: exact budget, random ties, bounds.

    python benchmarks/masking_choices.py FOLDER [--batch 64] [--draws 200]

FOLDER holds images, name.jpg; figures are about batches drawn from them at 224 x 224 in patches of 16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from record import record
from tokens import PATCH_SIZE, read_images
from torch import Tensor

from model.masking import MaskingConfig, PatchedImages, choose_patches
from model.masking.cluster import cluster_similarity, draw_anchors
from model.masking.reference import reference_masks

ANCHOR_RATIO, TARGET, MIN_RATIO = 0.03, 0.5, 0.3


def kept_mask(kept_K: Tensor, images: PatchedImages) -> Tensor:
    """bool [B, L]."""
    mask_N = torch.zeros(images.num_images * images.num_patches, dtype=torch.bool)
    mask_N[kept_K] = True
    return mask_N.view(images.num_images, images.num_patches)


def fixed_threshold(similarity_BL: Tensor, threshold: float) -> Tensor:
    """Masked share of each image under a threshold, at least MIN_RATIO: [B]."""
    return (similarity_BL > threshold).float().mean(dim=1).clamp_min(MIN_RATIO)


def by_row(kept_BL: Tensor, rows: int) -> list[float]:
    """Share of patches kept in each row of the grid."""
    return [round(share, 3) for share in kept_BL.float().mean(dim=0).view(rows, -1).mean(dim=1).tolist()]


def of_similarity(pixels_NCHW: Tensor, config: MaskingConfig, batch: int, draws: int) -> dict[str, Any]:
    """Threshold that meets the budget, and how unevenly images lose."""
    generator = torch.Generator().manual_seed(0)
    thresholds, ratios = [], []
    for _ in range(draws):
        chosen_B = torch.randperm(len(pixels_NCHW), generator=generator)[:batch]
        images = PatchedImages(pixels_NCHW[chosen_B], PATCH_SIZE)
        masks = choose_patches(images, config, generator)
        thresholds.append(masks.threshold)
        ratios.append(1 - kept_mask(masks.selection.kept_K, images).float().mean(dim=1))
    return {
        "threshold_mean": round(float(torch.stack(thresholds).mean()), 3),
        "threshold_std_over_batches": round(float(torch.stack(thresholds).std()), 4),
        "masked_share_of_images_quantiles_5_25_50_75_95": _quantiles(torch.cat(ratios)),
        "images_at_min_mask_ratio": _at_bound(torch.cat(ratios), images.num_patches),
    }


def _quantiles(ratio_N: Tensor) -> list[float]:
    return [round(value, 3) for value in ratio_N.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()]


def _at_bound(ratio_N: Tensor, num_patches: int) -> float:
    return round(float((ratio_N <= MIN_RATIO + 1 / num_patches).float().mean()), 3)


def measure(pixels_NCHW: Tensor, batch: int, draws: int) -> dict[str, Any]:
    """All figures."""
    generator = torch.Generator().manual_seed(0)
    shares, thresholds, ratios, image_ratios = [], [], [], []
    ours_kept, reference_kept = [], []
    for _ in range(draws):
        chosen_B = torch.randperm(len(pixels_NCHW), generator=generator)[:batch]
        images = PatchedImages(pixels_NCHW[chosen_B], PATCH_SIZE)
        anchors_BA = draw_anchors(batch, images.num_patches, ANCHOR_RATIO, generator)
        shares.append(fixed_threshold(cluster_similarity(images, anchors_BA).similarity_BL, TARGET).mean())
        masks = choose_patches(images, MaskingConfig(), generator)
        thresholds.append(masks.threshold)
        ours = kept_mask(masks.selection.kept_K, images)
        ratios.append(1 - ours.float().mean())
        image_ratios.append(1 - ours.float().mean(dim=1))
        ours_kept.append(ours)
        reference = reference_masks(images, TARGET, MIN_RATIO, ANCHOR_RATIO, generator)
        reference_kept.append(kept_mask(reference.selection.kept_K, images))
    rows = images.grid[0]
    return {
        "threshold_mean": round(float(torch.stack(thresholds).mean()), 3),
        "threshold_std_over_batches": round(float(torch.stack(thresholds).std()), 4),
        "masked_share_at_fixed_threshold_0.5": round(float(torch.stack(shares).mean()), 3),
        "masked_share_at_fixed_threshold_0.5_lowest_and_highest_batch": [
            round(float(torch.stack(shares).min()), 3),
            round(float(torch.stack(shares).max()), 3),
        ],
        "masked_share_exact_budget_lowest_and_highest_batch": [
            round(float(torch.stack(ratios).min()), 3),
            round(float(torch.stack(ratios).max()), 3),
        ],
        "masked_share_of_images_quantiles_5_25_50_75_95": _quantiles(torch.cat(image_ratios)),
        "images_at_min_mask_ratio": _at_bound(torch.cat(image_ratios), images.num_patches),
        "raw": of_similarity(pixels_NCHW, MaskingConfig(similarity="raw"), batch, draws),
        "kept_share_by_row": by_row(torch.cat(ours_kept), rows),
        "kept_share_by_row_released_code": by_row(torch.cat(reference_kept), rows),
        "kept_patches_released_code": int(reference_kept[-1][0].sum()),
        "batch": batch,
        "images": len(pixels_NCHW),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    pixels_NCHW = read_images(options.folder, len(list(options.folder.glob("*.jpg"))))
    figures = measure(pixels_NCHW, options.batch, options.draws)
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(record("masking_choices", figures, "python benchmarks/masking_choices.py FOLDER", options.draws))


if __name__ == "__main__":
    main()
