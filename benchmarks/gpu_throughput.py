"""On a GPU: images per second, model FLOPs utilisation, peak memory and time relative to no masking, in bf16.

    python benchmarks/gpu_throughput.py [--models ViT-B-16 ViT-L-14] [--batches 256 1024 4096] [--rounds 10]

A step is forward, backward and fused AdamW in bf16 autocast with the attention backend that `auto` takes; in the arms
`trainer_…` it is the one that `pipeline/train.py` takes, with the base recipe's engine, from the loader's bytes on. For
every model and batch the arms run interleaved; times are medians of steps timed on the device. Utilisation counts the
matrix products of model/flops.py against the peak that a large bf16 product reaches here, measured in the same run.
Batches from --checkpoint-from on recompute their blocks in the backward pass (which does not count as operations). A
batch that does not fit is recorded as such. Where open_clip is installed its own model is an arm too.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from record import record
from trainer_steps import learner_of, make_stage, trainer_step
from training_steps import Step, TrainingBatch, make_batch, packed_step, train_with

from model.config import config_from_name
from model.flops import step_flops
from pipeline.ranks import Ranks, init_ranks

Arm = Callable[[str, TrainingBatch, bool], Step]


def arms(ranks: Ranks) -> dict[str, Arm]:
    """What is compared: this project's strategies, bare and as trained, and open_clip where it is installed."""

    def trained(strategy: str, compiled: bool = False) -> Arm:
        def make(name: str, batch: TrainingBatch, checkpoint: bool) -> Step:
            options = [f"train.activation_checkpointing={checkpoint}", f"train.compile={compiled}"]
            stage = make_stage(name, len(batch.lengths_B), strategy, options)
            return trainer_step(learner_of(stage, ranks), batch)

        return make

    found: dict[str, Arm] = {
        "none": lambda name, batch, checkpoint: packed_step(name, batch, "none", checkpoint=checkpoint),
        "random_0.5": lambda name, batch, checkpoint: packed_step(name, batch, "random", checkpoint=checkpoint),
        "cluster_0.5": lambda name, batch, checkpoint: packed_step(name, batch, "cluster", checkpoint=checkpoint),
        "cluster_0.5_compiled": lambda name, batch, checkpoint: packed_step(
            name, batch, "cluster", checkpoint=checkpoint, compiled=True
        ),
        "trainer_none": trained("none"),
        "trainer_random_0.5": trained("random"),
        "trainer_cluster_0.5": trained("cluster"),
        "trainer_cluster_0.5_compiled": trained("cluster", compiled=True),
    }
    try:
        from open_clip import ClipLoss, create_model
    except ImportError:
        return found

    def open_clip_step(name: str, batch: TrainingBatch, checkpoint: bool, patch_dropout: float) -> Step:
        model = create_model(name, device=batch.images_BCHW.device, force_patch_dropout=patch_dropout).train()
        model.set_grad_checkpointing(checkpoint)
        loss = ClipLoss()
        return train_with(model, lambda: loss(*model(batch.images_BCHW, batch.tokens_BT)[:3]))

    return {
        "open_clip": lambda name, batch, checkpoint: open_clip_step(name, batch, checkpoint, 0.0),
        "open_clip_patch_dropout_0.5": lambda name, batch, checkpoint: open_clip_step(name, batch, checkpoint, 0.5),
        **found,
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Step, device: torch.device) -> float:
    """One step's time, work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def made_with_peak(make: Callable[[], Step], device: torch.device) -> tuple[Step, int | None]:
    """A step that has run twice, and the memory it took at most beyond what was in use before; None on a CPU."""
    if device.type != "cuda":
        step = make()
        step()
        return step, None
    gc.collect()  # engines of the batch before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = make()
    step()
    step()
    return step, torch.cuda.max_memory_allocated(device) - before


def peak_flops_per_s(device: torch.device) -> float:
    """What a large bf16 matrix product reaches."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


def model_flops(name: str, batch: TrainingBatch, mask_ratio: float) -> int:
    """Operations of one step at this share of dropped patches; attention as if all images kept alike."""
    config = config_from_name(name)
    kept = round((1 - mask_ratio) * config.vision.num_patches)
    return step_flops(config, [kept] * len(batch.lengths_B), batch.lengths_B.tolist())


def measure(
    name: str,
    batch: TrainingBatch,
    rounds: int,
    peak: float,
    checkpoint: bool,
    wanted: Collection[str],
    ranks: Ranks,
) -> dict[str, Any]:
    """Figures of the wanted arms for one model and batch; arms that do not fit say so."""
    device, pairs = batch.images_BCHW.device, len(batch.lengths_B)
    steps: dict[str, Step] = {}
    figures: dict[str, Any] = {}
    for arm, make in arms(ranks).items():
        if wanted and arm not in wanted:
            continue
        try:
            step, peak_bytes = made_with_peak(lambda make=make: make(name, batch, checkpoint), device)
            steps[arm] = step
            figures[arm] = {"peak_bytes": peak_bytes}
        except torch.OutOfMemoryError:
            figures[arm] = {"fits": False}
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    for number in range(rounds):
        order = [*steps][number % len(steps) :] + [*steps][: number % len(steps)] if steps else []
        for arm in order:
            times[arm].append(seconds(steps[arm], device))
    for arm, values in times.items():
        median = statistics.median(values)
        figures[arm] |= {"images_per_s": round(pairs / median, 1), "step_s": round(median, 5)}
        if not arm.startswith("open_clip"):
            operations = model_flops(name, batch, 0.0 if arm.endswith("none") else 0.5)
            figures[arm]["mfu"] = round(operations / median / peak, 4)
        for base in ("none", "open_clip"):
            if base in times:
                ratios = [a / b for a, b in zip(values, times[base], strict=True)]
                figures[arm][f"time_over_{base}"] = round(statistics.median(ratios), 4)
    return figures


def main() -> None:
    """Measure every model and batch and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-16", "ViT-L-14"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--checkpoint-from", type=int, default=2048, metavar="B", help="recompute blocks from here on")
    parser.add_argument("--arms", nargs="+", default=[], help="only these (default: all there are)")
    parser.add_argument("--part", help="write the figures under this key, beside those that are there")
    parser.add_argument("--device", default="cuda", help="cpu tries the script, with small models and batches")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; --device cpu --models ViT-test-8 --batches 8 tries the script")
    logging.disable()
    ranks = replace(init_ranks(), device=device)
    peak = peak_flops_per_s(device)
    figures: dict[str, Any] = {"bf16_peak_flops_per_s": round(peak)}
    for name in options.models:
        for size in options.batches:
            batch = make_batch(size, config_from_name(name).vision.image_size).to(device)
            measured = measure(name, batch, options.rounds, peak, size >= options.checkpoint_from, options.arms, ranks)
            figures.setdefault(name, {})[str(size)] = measured
            print(name, size, measured, flush=True)
    if device.type == "cuda":
        figures["device"] = torch.cuda.get_device_name(device)
        command = f"python benchmarks/gpu_throughput.py --models {' '.join(options.models)}"
        print(record("gpu_throughput", figures, command, options.rounds, options.part))


if __name__ == "__main__":
    main()
