"""Training at 112 pixels from an edition of 128-pixel pictures, over the same from the 256-pixel set behind it.

    python benchmarks/low_resolution.py PHOTOS.parquet MERGES [--rounds 11]

PHOTOS as for loader.py; MERGES is CLIP's `bpe_simple_vocab_16e6.txt.gz`. The set is what `data-prep download` writes at
256 pixels, the edition what `data-prep reshard --image-size 128` makes of it. Images per second of one core, processor
time, the loader's worker included; the sides take turns, and of the rounds' ratios median and quartiles are given.

Both ways are compared after the transform, on crops that show the same part of a picture: mean and 99th percentile of
the absolute difference in grey levels. Beside it stands what 256 pixels and quality 95 had already changed of the
originals. Adds to results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
import torch
from loader import cpu_s, endless_batches, load, nothing, transform, write_shards
from record import record

from data_prep.editions import write_edition
from data_prep.web.web_image import to_jpeg
from formats.tar import IMAGE_TYPES, TarSamples
from pipeline.data.image_transform import decode_image, random_crop_box, resize

IMAGE_SIZE, MIN_AREA = 112, 0.4  # of efficient_vit_b16's first stage
STORED, SMALL, QUALITY = 256, 128, 90
# Of the recipe 3,500: what handing a batch over takes is of its images, not of the batch.
BATCH_SIZE, BATCHES = 512, 4


def pictures_of(shards: Path) -> list[bytes]:
    """Of the first shard, in order."""
    samples = TarSamples(shards / "00000.tar")
    return [next(data for kind, data in sample.members.items() if kind in IMAGE_TYPES) for sample in samples]


def differences(jpegs: list[bytes], smaller: list[bytes]) -> dict[str, float]:
    """Of the same parts of both, each drawn once, scaled to the training size: grey levels."""
    found = []
    for number, (large, small) in enumerate(zip(jpegs, smaller, strict=True)):
        large_CHW, small_CHW = decode_image(large), decode_image(small)
        _, H, W = small_CHW.shape
        top, left, height, width = random_crop_box(H, W, MIN_AREA, random.Random(f"0/{number}"))
        down, across = large_CHW.shape[1] / H, large_CHW.shape[2] / W
        box = (round(top * down), round(left * across), round(height * down), round(width * across))
        crops = [crop(large_CHW, *box), crop(small_CHW, top, left, height, width)]
        found.append(np.abs(crops[0] - crops[1]).ravel())
    values = np.concatenate(found)
    return {"mean": round(float(values.mean()), 2), "p99": round(float(np.percentile(values, 99)), 1)}


def crop(image_CHW: torch.Tensor, top: int, left: int, height: int, width: int) -> Any:
    """A part at the training size."""
    scaled_CHW = resize(image_CHW[:, top : top + height, left : left + width], IMAGE_SIZE, IMAGE_SIZE)
    return scaled_CHW.numpy().astype(np.int16)


def load_alone(loader: Iterator[Any]) -> float:
    """Seconds a sample, while the other loader's worker has made in advance what it may and rests."""
    before_s = -1.0
    while (now_s := cpu_s()) > before_s + 0.02:
        before_s = now_s
        time.sleep(0.3)
    return load(loader, nothing, BATCHES)


def interleaved(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each arm gives in each round; they begin in turn, and a round to warm up is left out."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name in [*arms][number % len(arms) :] + [*arms][: number % len(arms)]:
            value = arms[name]()
            if number >= 0:
                found[name].append(value)
    return found


def measure(folder: Path, originals: list[bytes], captions: list[str], merges: str, rounds: int) -> dict[str, Any]:
    """All figures."""
    jpegs = [to_jpeg(original, STORED, "keep_ratio").data for original in originals]
    write_shards(folder / "set", jpegs, captions)
    write_edition(folder / "set", folder / "edition", SMALL, QUALITY, processes=1)
    smaller = pictures_of(folder / "edition")

    def batches(name: str) -> Iterator[Any]:
        return endless_batches(folder / name, merges, folder / "cache", IMAGE_SIZE, MIN_AREA, BATCH_SIZE)

    loaders = {name: batches(name) for name in ("set", "edition")}
    arms: dict[str, Callable[[], float]] = {
        "transform_set": lambda: transform(jpegs, nothing, IMAGE_SIZE, MIN_AREA),
        "transform_edition": lambda: transform(smaller, nothing, IMAGE_SIZE, MIN_AREA),
        "loader_set": lambda: load_alone(loaders["set"]),
        "loader_edition": lambda: load_alone(loaders["edition"]),
    }
    seconds = interleaved(arms, rounds)

    def ratio(part: str) -> list[float]:
        ratios = [a / b for a, b in zip(seconds[f"{part}_set"], seconds[f"{part}_edition"], strict=True)]
        return [round(value, 2) for value in statistics.quantiles(ratios, n=4)]

    def size(shards: str) -> int:
        return sum(path.stat().st_size for path in (folder / shards).glob("*.tar"))

    return {
        "image_size": IMAGE_SIZE,
        "crop_min_area": MIN_AREA,
        "batch_size": BATCH_SIZE,
        "quality": QUALITY,
        "loader_quartiles": ratio("loader"),
        "transform_quartiles": ratio("transform"),
        "images_per_core_s": {name: round(1 / statistics.median(seconds[f"loader_{name}"])) for name in loaders},
        "ms": {name: round(statistics.median(values) * 1e3, 3) for name, values in seconds.items()},
        "difference": differences(jpegs, smaller),
        "difference_of_set_from_originals": differences(originals, jpegs),
        "bytes_per_image": {
            "set": round(statistics.mean(map(len, jpegs))),
            "edition": round(statistics.mean(map(len, smaller))),
        },
        "edition_share_of_disk": round(size("edition") / size("set"), 3),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, metavar="PHOTOS.parquet")
    parser.add_argument("merges", metavar="MERGES")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = pq.read_table(options.photos, columns=["image", "captions"]).to_pylist()
    originals, captions = [row["image"] for row in rows], [row["captions"][0] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), originals, captions, options.merges, options.rounds)
    figures = {"low_resolution_over_256px": found["loader_quartiles"][1], "low_resolution": found}
    print(json.dumps(figures, indent=2))
    command = f"python benchmarks/low_resolution.py {options.photos.name} {Path(options.merges).name}"
    print(record("loader", figures, f"{command} --rounds {options.rounds}", options.rounds, keep_others=True))


if __name__ == "__main__":
    main()
