"""open_clip's side of benchmarks/loader.py: runs where open_clip is installed, and imports nothing of the project.

A line on stdin is a JSON list, a command and its arguments; the answer is one JSON line.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision_cpu  # noqa: F401
from open_clip import get_tokenizer
from open_clip.tokenizer import default_bpe
from open_clip.transform import image_transform
from open_clip_train import data
from PIL import Image

torch.set_num_threads(1)
TRANSFORM = image_transform(224, is_train=True)
TOKENIZER = get_tokenizer("ViT-B-16")
LOADERS: dict[str, Iterator[Any]] = {}

_expand_tars = data.tar_file_expander


def _members(*arguments: Any, **named: Any) -> Iterator[dict[str, Any]]:
    """Newer webdatasets mark the end of each tar, with which open_clip's grouping cannot deal."""
    return (member for member in _expand_tars(*arguments, **named) if "fname" in member)


data.tar_file_expander = _members


def cpu_s() -> float:
    """Processor time of this process and of its workers, which other programs on the machine disturb little."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def merges() -> str:
    """The path of CLIP's byte-pair merges."""
    return str(default_bpe())


def transform(folder: str) -> float:
    """Seconds an image from JPEG bytes to the tensor that the model gets."""
    files = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    start_s = time.process_time()
    for content in files:
        TRANSFORM(Image.open(io.BytesIO(content)).convert("RGB"))
    return (time.process_time() - start_s) / len(files)


def load(shards: str, batch_size: int, batches: int) -> float:
    """Seconds a sample of `batches` batches from its training pipeline with one worker, warm."""
    if shards not in LOADERS:
        options = SimpleNamespace(
            train_data=shards,
            train_num_samples=10**9,
            dataset_resampled=True,
            train_data_upsampling_factors=None,
            seed=0,
            batch_size=batch_size,
            workers=1,
            world_size=1,
        )
        LOADERS[shards] = iter(data.get_wds_dataset(options, TRANSFORM, True, tokenizer=TOKENIZER).dataloader)
    return timed(LOADERS[shards], batches, batch_size)


def timed(loader: Iterator[Any], batches: int, batch_size: int) -> float:
    """Seconds a sample; what was made in advance while nobody asked is thrown away first."""
    for _ in range(4):
        next(loader)
    start_s = cpu_s()
    for _ in range(batches):
        next(loader)
    return (cpu_s() - start_s) / batches / batch_size


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print is no answer
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps({"merges": merges, "transform": transform, "load": load}[command](*arguments)), file=answers)
        answers.flush()
