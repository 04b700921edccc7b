"""Images per second of `data-prep verify` at 224 pixels, in one process, on photographs.

    python benchmarks/data_prep_verify.py PHOTOS.parquet [--samples 5000] [--rounds 5]

PHOTOS has a column `image` of encoded pictures; they are scaled and cropped to 224 x 224, encoded anew with quality 95
as img2dataset does, and repeated. Arms are interleaved: `images_per_s` decodes everything; `pillow_images_per_s` does
the same with Pillow's full decode in place of ours; `unchanged_images_per_s` is a second run, which compares hashes.
Each is the median over rounds. `rewrite_megabytes_per_s` is measured once, leaving one sample out of each shard.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pyarrow.parquet as pq
from PIL import Image, ImageOps

from benchmarks.record import record
from data_prep.shards.publish import changing
from data_prep.shards.rewrite import Removal, rewrite_shards
from data_prep.shards.verify import verify
from data_prep.shards.writer import ShardWriter
from formats.manifest import read_manifest
from formats.pictures import _check_with_pillow

SAMPLES_PER_SHARD = 1000


def main() -> None:
    """Make the shards, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="parquet with a column `image`")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "shards"
        mean_bytes = write_shards(directory, options.photos, options.samples)
        figures = measure(directory, options.samples, options.rounds) | {"bytes_per_image": round(mean_bytes)}
    print(json.dumps(figures, indent=2))
    command = f"benchmarks/data_prep_verify.py PHOTOS.parquet --samples {options.samples} --rounds {options.rounds}"
    print(record("data_prep", figures, command, options.rounds, part="verify"))


def write_shards(directory: Path, photos: Path, samples: int) -> float:
    """Shards of `samples` pictures; returns their mean size in bytes."""
    pictures = [at_224(data) for data in pq.read_table(photos, columns=["image"])["image"].to_pylist()[:300]]
    with ShardWriter(directory, SAMPLES_PER_SHARD) as writer:
        for number in range(samples):
            key = f"{number:09d}"
            metadata = {"key": key, "url": f"https://example.org/{number}.jpg", "width": 224, "height": 224}
            members = {"txt": b"a caption of some ten words, as they are", "json": json.dumps(metadata).encode()}
            writer.write(key, {"jpg": pictures[number % len(pictures)], **members})
    return statistics.mean(map(len, pictures))


def at_224(data: bytes) -> bytes:
    """The middle of a picture, 224 x 224, JPEG of quality 95."""
    stream = io.BytesIO()
    ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), (224, 224)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def measure(directory: Path, samples: int, rounds: int) -> dict[str, float]:
    """Medians over rounds in which the arms follow each other."""

    def with_pillow() -> None:
        with mock.patch("data_prep.shards.verify.check_picture", _check_with_pillow):
            verify(directory, 1, max_bad_ratio=0.0, again=True)

    arms: dict[str, Callable[[], object]] = {
        "images_per_s": lambda: verify(directory, 1, max_bad_ratio=0.0, again=True),
        "pillow_images_per_s": with_pillow,
        "unchanged_images_per_s": lambda: verify(directory, 1, max_bad_ratio=0.0),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            start_s = time.perf_counter()
            arm()
            rates[name].append(samples / (time.perf_counter() - start_s))
    figures: dict[str, float] = {name: round(statistics.median(of)) for name, of in rates.items()}
    ratios = [ours / plain for ours, plain in zip(rates["images_per_s"], rates["pillow_images_per_s"], strict=True)]
    figures["over_pillow"] = round(statistics.median(ratios), 2)
    figures["rewrite_megabytes_per_s"] = rewriting(directory)
    return figures


def rewriting(directory: Path) -> float:
    """Megabytes per second of shards rewritten without their first sample."""
    with changing(directory) as staged:
        lines = read_manifest(directory).shards
        removals = [
            Removal(line, frozenset({f"{number * SAMPLES_PER_SHARD:09d}"})) for number, line in enumerate(lines)
        ]
        start_s = time.perf_counter()
        rewrite_shards(directory, staged, removals, {"step": "benchmark"}, 1, len(removals))
        return round(sum(line.size_bytes for line in lines) / 1e6 / (time.perf_counter() - start_s))


if __name__ == "__main__":
    main()
