"""What a fixed similarity threshold drops where an exact budget drops half: part `budget` of results/study.json.

    python benchmarks/study/budget.py --data FOLDER [--batch 256] [--batches 64]

The threshold is the one at which batches of the first set lose half of their patches on average. It is then kept, for
batches of that set, which ranks would draw, and for other sets. FOLDER is what prepare.sh made.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from record import record
from torch import Tensor

from model.masking.cluster import cluster_similarity, draw_anchors
from model.packing import PatchedImages, normalize_pixels
from pipeline.data.image_transform import decode_image, resize_center_crop

TARGET, MIN_RATIO, ANCHOR_RATIO, PATCH_SIZE = 0.5, 0.3, 0.03, 8
RANKS = 8
SETS = {"flickr8k": ("flickr_train", 112), "cifar10": ("cifar_train", 64), "synthetic": ("synthetic_train", 64)}


def read_pictures(shards: Path, count: int, size: int) -> Tensor:
    """Pictures from the start of a set, each once, uint8 [N, 3, S, S]."""
    pictures: dict[int, Tensor] = {}
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith((".jpg", ".png")) or (file := tar.extractfile(member)) is None:
                    continue
                data = file.read()
                if hash(data) not in pictures:
                    pictures[hash(data)] = resize_center_crop(decode_image(data), size)
                if len(pictures) == count:
                    return torch.stack([*pictures.values()])
    return torch.stack([*pictures.values()])


def similarities(pictures: Tensor, batch: int, batches: int) -> list[Tensor]:
    """Of random batches, as training draws them: [B, L] each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batches):
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        images = PatchedImages(normalize_pixels(pictures[chosen]), PATCH_SIZE)
        anchors_BA = draw_anchors(batch, images.num_patches, ANCHOR_RATIO, generator)
        found.append(cluster_similarity(images, anchors_BA).similarity_BL)
    return found


def dropped(similarity_BL: Tensor, threshold: float) -> float:
    """Share of a batch's patches above a threshold, at least MIN_RATIO of each image."""
    return float((similarity_BL > threshold).float().mean(dim=1).clamp_min(MIN_RATIO).mean())


def calibrate(batches: list[Tensor]) -> float:
    """The threshold at which they lose TARGET on average, by bisection."""
    low, high = -1.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        is_too_many = sum(dropped(batch, middle) for batch in batches) / len(batches) > TARGET
        low, high = (middle, high) if is_too_many else (low, middle)
    return (low + high) / 2


def describe(batches: list[Tensor], threshold: float) -> dict[str, Any]:
    """Shares that batches lose, and how much longer than the mean the fullest of RANKS batches is."""
    shares = torch.tensor([dropped(batch, threshold) for batch in batches])
    kept = (1 - shares).view(-1, RANKS)
    return {
        "dropped_mean": round(float(shares.mean()), 4),
        "dropped_sd_over_batches": round(float(shares.std()), 4),
        "dropped_lowest_and_highest": [round(float(shares.min()), 4), round(float(shares.max()), 4)],
        f"fullest_of_{RANKS}_ranks_over_mean": round(float((kept.amax(1) / kept.mean(1)).mean()), 4),
        "tokens_over_exact_budget": round(float((1 - shares).mean()) / (1 - TARGET), 4),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=64, help=f"a multiple of {RANKS}")
    parser.add_argument("--pictures", type=int, default=6000, help="of each set")
    options = parser.parse_args()
    figures: dict[str, Any] = {"batch": options.batch}
    for name, (shards, size) in SETS.items():
        pictures = read_pictures(options.data / shards, options.pictures, size)
        batches = similarities(pictures, options.batch, options.batches)
        figures.setdefault("threshold", round(calibrate(batches), 4))
        own = {"pictures": len(pictures), "own_threshold": round(calibrate(batches), 4)}
        figures[name] = own | describe(batches, figures["threshold"])
        print(name, figures[name], flush=True)
    print(record("study", figures, "python benchmarks/study/budget.py --data FOLDER", options.batches, "budget"))


if __name__ == "__main__":
    main()
