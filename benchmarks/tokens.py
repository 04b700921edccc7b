"""Tokens that the towers process for every token that is needed: packed, and padded as the released code pads.

    python benchmarks/tokens.py [--batch 256] [--draws 20] [--data FOLDER]

Needed are the visible patches and the class token of each image, and the tokens of each caption. FOLDER holds pairs,
name.jpg and name.txt, of which images are used; without it they are made up. Counts, not times: the machine does not
matter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pictures import smooth_images
from record import record
from reference_scheme import ANCHOR_RATIO, MIN_MASK_RATIO, THRESHOLD
from torch import Tensor
from training_steps import CONTEXT, LONGEST, SHORTEST

from model.masking import MaskingConfig, PatchedImages, choose_patches
from model.masking.reference import reference_masks
from model.packing import normalize_pixels
from pipeline.data.image_transform import decode_image, resize_center_crop

PATCH_SIZE, IMAGE_SIZE = 16, 224


def read_images(folder: Path, count: int) -> Tensor:
    """The first images of a folder as normalised pixels [count, 3, S, S]."""
    paths = sorted(folder.glob("*.jpg"))[:count]
    if len(paths) < count:
        raise SystemExit(f"error: {folder} holds {len(paths)} .jpg files, {count} are needed")
    return normalize_pixels(torch.stack([resize_center_crop(decode_image(p.read_bytes()), IMAGE_SIZE) for p in paths]))


def packed_ratio(images: PatchedImages, generator: torch.Generator) -> float:
    """Processed over needed: every kept patch is visible, and nothing is added."""
    selection = choose_patches(images, MaskingConfig(), generator).selection
    visible_B = selection.cu_seqlens_B1.diff()
    return (selection.kept_K.numel() + images.num_images) / float(visible_B.sum() + images.num_images)


def padded_ratio(images: PatchedImages, generator: torch.Generator) -> float:
    """Processed over needed in the released code: one length for all images, of which some tokens are masked ones."""
    selection, visible_BT = reference_masks(images, THRESHOLD, MIN_MASK_RATIO, ANCHOR_RATIO, generator)
    return (selection.kept_K.numel() + images.num_images) / float(visible_BT.sum())


def main() -> None:
    """Count and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images, name.jpg")
    options = parser.parse_args()
    pixels = read_images(options.data, options.batch) if options.data else smooth_images(options.batch, IMAGE_SIZE)
    images, generator = PatchedImages(pixels, PATCH_SIZE), torch.Generator().manual_seed(0)
    figures = {
        "image_packed": round(statistics.mean(packed_ratio(images, generator) for _ in range(options.draws)), 3),
        "image_padded": round(statistics.mean(padded_ratio(images, generator) for _ in range(options.draws)), 3),
        "text_packed": 1.0,
        "text_padded": round(CONTEXT / ((SHORTEST + LONGEST) / 2), 3),
        "batch": options.batch,
        "data": "real photographs" if options.data else "made up",
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    command = "python benchmarks/tokens.py" + (" --data FOLDER" if options.data else "")
    print(record("tokens", figures, command, options.draws))


if __name__ == "__main__":
    main()
