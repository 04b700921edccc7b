"""Our loader against open_clip's on one core: the transform of an image, and the whole way from shards to batches.

    PEERS_PYTHON=.peers/bin/python python benchmarks/loader.py PHOTOS.parquet [--rounds 9]

PHOTOS has JPEGs in a column `image` and lists of captions in `captions` (Flickr8k's 500-px originals). They are
measured as they are, and at 256 px as `data-prep download` writes them. Times are processor time, workers' included,
on one core; the sides take turns within each round, and ratios are medians of the rounds' ratios. Ours gives uint8,
which the device normalises; figures with normalisation on the same core are beside it. open_clip's loader is
`get_wds_dataset` of its training script, with its tokenizer, its transform and one worker.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from record import record

from data_prep.shards.verify import verify
from data_prep.web.web_image import to_jpeg
from model.packing import normalize_pixels
from pipeline.data.captions import load_tokenizer
from pipeline.data.data_loader import Batch, MicroBatches, TrainingSet, make_loader
from pipeline.data.image_transform import decode_image, random_crop_box, random_resized_crop
from pipeline.data.sample_order import BatchPlan
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import read_training_data
from pipeline.recipe import DataSection, TextMaskingSection

IMAGE_SIZE, MIN_AREA = 224, 0.9
SHARDS, BATCH_SIZE, BATCHES = 4, 64, 5


class OpenClip:
    """The other side, in its own environment; call it with a command of loader_peer.py and its arguments."""

    def __init__(self) -> None:
        python = os.environ.get("PEERS_PYTHON")
        if not python:
            raise SystemExit("error: PEERS_PYTHON names no interpreter with open_clip: run `make peers` first")
        script = Path(__file__).with_name("loader_peer.py")
        self._process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *request: str | int) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def cpu_s() -> float:
    """Processor time of this process and of its workers, which other programs on the machine disturb little."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def write_files(folder: Path, jpegs: list[bytes]) -> None:
    folder.mkdir()
    for number, jpeg in enumerate(jpegs):
        (folder / f"{number:05d}.jpg").write_bytes(jpeg)


def write_shards(folder: Path, jpegs: list[bytes], captions: list[str]) -> None:
    """Shards with a manifest; the pictures come in each."""
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, (jpeg, caption) in enumerate(zip(jpegs, captions, strict=True)):
                for kind, content in (("jpg", jpeg), ("txt", caption.encode())):
                    header = tarfile.TarInfo(f"{shard:05d}{number:06d}.{kind}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    verify(folder, processes=1, max_bad_ratio=0)


def transform(
    jpegs: list[bytes], finish: Callable[[torch.Tensor], object], image_size: int = IMAGE_SIZE, area: float = MIN_AREA
) -> float:
    """Seconds an image, with what comes after the crop."""
    start_s = time.process_time()
    for number, jpeg in enumerate(jpegs):
        finish(random_resized_crop(decode_image(jpeg), image_size, area, random.Random(f"0/{number}")))
    return (time.process_time() - start_s) / len(jpegs)


def endless_batches(
    shards: Path,
    merges: str,
    cache: Path,
    image_size: int = IMAGE_SIZE,
    area: float = MIN_AREA,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """Our loader with one worker."""
    section = DataSection(train=str(shards), cache_directory=str(cache), crop_min_area=area)
    data = read_training_data(section)
    captions = TextMasker(load_tokenizer(merges, 77), TextMaskingSection())
    reader = ShardReader(data.shards, make_cache(section))
    dataset = TrainingSet(reader, data.order(section, 0), 0, captions, image_size, area)
    plan = BatchPlan(data.num_samples, batch_size, batch_size, world_size=1)
    return iter(make_loader(dataset, MicroBatches(plan, 0, 0, 10**6), workers=1, pin_memory=False))


def load(loader: Iterator[Batch], finish: Callable[[torch.Tensor], object], batches: int = BATCHES) -> float:
    """Seconds a sample, warm."""
    for _ in range(5):  # what was made in advance while nobody asked
        next(loader)
    start_s, images = cpu_s(), 0
    for _ in range(batches):
        batch = next(loader)
        finish(batch.images_BCHW)
        images += len(batch.keys)
    return (cpu_s() - start_s) / images


def pixel_difference(jpegs: list[bytes]) -> float:
    """Mean difference in grey levels to the same crops decoded and resized (bicubic, antialiased) by Pillow."""
    differences = []
    for number, jpeg in enumerate(jpegs):
        ours = random_resized_crop(decode_image(jpeg), IMAGE_SIZE, MIN_AREA, random.Random(f"0/{number}"))
        picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
        box = random_crop_box(picture.height, picture.width, MIN_AREA, random.Random(f"0/{number}"))
        top, left, height, width = box
        crop = picture.crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), dtype=np.int16)
        differences.append(np.abs(ours.permute(1, 2, 0).numpy().astype(np.int16) - expected).mean())
    return float(np.mean(differences))


def nothing(images: torch.Tensor) -> None:
    """The device normalises."""


def measure(folder: Path, jpegs: list[bytes], captions: list[str], open_clip: OpenClip, rounds: int) -> dict[str, Any]:
    """All figures for one kind of picture."""
    write_files(folder / "files", jpegs)
    write_shards(folder / "shards", jpegs, captions)
    ours = endless_batches(folder / "shards", open_clip("merges"), folder / "cache")
    theirs = str(folder / "shards" / f"{{00000..{SHARDS - 1:05d}}}.tar")
    arms: dict[str, Callable[[], float]] = {
        "open_clip_transform": lambda: open_clip("transform", str(folder / "files")),
        "transform": lambda: transform(jpegs, nothing),
        "transform_and_normalise": lambda: transform(jpegs, normalize_pixels),
        "open_clip_loader": lambda: open_clip("load", theirs, BATCH_SIZE, BATCHES),
        "loader": lambda: load(ours, nothing),
        "loader_and_normalise": lambda: load(ours, normalize_pixels),
        "decode": lambda: timed(jpegs, decode_image),
        "entropy_decode": lambda: timed(jpegs, eighth),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):  # the first warms up
        for name in [*arms][number % len(arms) :] + [*arms][: number % len(arms)]:
            elapsed_s = arms[name]()
            if number >= 0:
                seconds[name].append(elapsed_s)

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True)), 3)

    return {
        "transform_over_open_clip": ratio("transform", "open_clip_transform"),
        "transform_and_normalise_over_open_clip": ratio("transform_and_normalise", "open_clip_transform"),
        "decode_alone_over_open_clip": ratio("decode", "open_clip_transform"),
        "entropy_decode_over_open_clip": ratio("entropy_decode", "open_clip_transform"),
        "samples_per_s_over_open_clip": ratio("loader", "open_clip_loader"),
        "normalised_samples_per_s_over_open_clip": ratio("loader_and_normalise", "open_clip_loader"),
        "pixel_difference": round(pixel_difference(jpegs), 4),
        "bytes_per_image": round(statistics.mean(map(len, jpegs))),
        "ms": {name: round(statistics.median(values) * 1e3, 3) for name, values in seconds.items()},
    }


def timed(jpegs: list[bytes], work: Callable[[bytes], object]) -> float:
    """Seconds an image."""
    start_s = time.process_time()
    for jpeg in jpegs:
        work(jpeg)
    return (time.process_time() - start_s) / len(jpegs)


def eighth(jpeg: bytes) -> object:
    """Decoding to an eighth of the size in grey, nearly nothing but the entropy code: no decoder is faster."""
    import simplejpeg

    return simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, min_factor=8)


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, metavar="PHOTOS.parquet")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = pq.read_table(options.photos, columns=["image", "captions"]).to_pylist()
    originals, captions = [row["image"] for row in rows], [row["captions"][0] for row in rows]
    open_clip = OpenClip()
    figures: dict[str, Any] = {"image_size": IMAGE_SIZE, "batch_size": BATCH_SIZE}
    with tempfile.TemporaryDirectory() as folder:
        for name, jpegs in (
            ("originals", originals),
            ("256px", [to_jpeg(jpeg, 256, "keep_ratio").data for jpeg in originals]),
        ):
            (Path(folder) / name).mkdir()
            figures[name] = measure(Path(folder) / name, jpegs, captions, open_clip, options.rounds)
    for name in ("transform_over_open_clip", "samples_per_s_over_open_clip"):
        figures[name] = {kind: figures[kind][name] for kind in ("originals", "256px")}
    print(json.dumps(figures, indent=2))
    command = f"python benchmarks/loader.py {options.photos.name} --rounds {options.rounds}"
    print(record("loader", figures, command, options.rounds, keep_others=True))


if __name__ == "__main__":
    main()
