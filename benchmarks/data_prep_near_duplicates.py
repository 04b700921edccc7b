"""What the perceptual hash of `data-prep dedup` finds, on photographs.

    python benchmarks/data_prep_near_duplicates.py PHOTOS.parquet MORE_PHOTOS.parquet

Of PHOTOS (a column `image`), each is changed in several ways: `recall` is the share of changed pictures that differ
from their original in at most 4 of 64 bits. Of MORE_PHOTOS, which are to be different pictures, `pairs_by_distance`
says how many pairs there are at each small distance; `hashes_per_s` is of one process.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from benchmarks.record import record
from data_prep.near.perceptual_hash import distances, hash_pictures, shrink

MAX_DISTANCE = 4
LARGEST_LISTED = 12


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("more_photos", type=Path)
    options = parser.parse_args()
    figures = {"recall": recall(read(options.photos)), **unrelated(read(options.more_photos))}
    print(json.dumps(figures, indent=2))
    command = "benchmarks/data_prep_near_duplicates.py PHOTOS.parquet MORE_PHOTOS.parquet"
    print(record("data_prep", figures, command, repeats=1, part="near_duplicates"))


def read(path: Path) -> list[bytes]:
    """The column `image`."""
    pictures: list[bytes] = pq.read_table(path, columns=["image"])["image"].to_pylist()
    return pictures


def recall(pictures: list[bytes]) -> dict[str, float]:
    """Share of the changed pictures that are found, for each change."""
    original_N = hash_pictures([shrink(data) for data in pictures])
    return {
        name: round(float(np.mean(distances(original_N, hash_changed(pictures, change)) <= MAX_DISTANCE)), 3)
        for name, change in CHANGES.items()
    }


def hash_changed(pictures: list[bytes], change: Callable[[Image.Image], bytes]) -> np.ndarray:
    """The hashes of changed pictures."""
    return hash_pictures([shrink(change(Image.open(io.BytesIO(data)).convert("RGB"))) for data in pictures])


def encoded(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality)
    return stream.getvalue()


def cropped(image: Image.Image, share: float) -> bytes:
    """The picture without `share` of its width and height at each edge."""
    x, y = round(image.width * share), round(image.height * share)
    return encoded(image.crop((x, y, image.width - x, image.height - y)))


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "squeezed_to_224_quality_75": lambda image: encoded(image.resize((224, 224)), quality=75),
    "halved_quality_50": lambda image: encoded(image.reduce(2), quality=50),
    "webp_quality_60": lambda image: encoded(image, "WEBP", 60),
    "brightness_1.2": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.2)),
    "contrast_0.8": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.8)),
    "grey": lambda image: encoded(image.convert("L")),
    "cropped_2_percent": lambda image: cropped(image, 0.02),
    "cropped_5_percent": lambda image: cropped(image, 0.05),
}


def unrelated(pictures: list[bytes]) -> dict[str, object]:
    """Pairs at small distances among different pictures, all with all."""
    start_s = time.perf_counter()
    hashes_N = hash_pictures([shrink(data) for data in pictures])
    rate = len(pictures) / (time.perf_counter() - start_s)
    pairs = np.zeros(65, np.int64)
    for step in range(1, len(hashes_N)):
        pairs += np.bincount(distances(hashes_N[step:], hashes_N[:-step]), minlength=65)
    return {
        "pairs": int(pairs.sum()),
        "pairs_by_distance": {str(bits): int(pairs[bits]) for bits in range(LARGEST_LISTED + 1)},
        "hashes_per_s": round(rate),
    }


if __name__ == "__main__":
    main()
