"""What choosing the patches costs: time per image, memory, share of a training step; against the released code's way.

    python benchmarks/masking_cost.py [--batch 256] [--rounds 9]

Both sides start from the same fp32 images (B, 3, 224, 224) in patches of 16 and end with the kept patches of every
image: ours with packed indices and prefix sums, the released code's with indices and a dense attention mask. Rounds are
interleaved; figures are medians. Peak memory is the growth of the process beyond what it held before the call. The
step is forward, backward and AdamW of ViT-B/16 in bf16 autocast, per image at batch 16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pictures import smooth_images
from record import record
from reference_scheme import reference_op
from training_steps import make_batch, packed_step

from model.masking import MaskingConfig, PatchedImages, choose_patches, patchify

PATCH_SIZE = 16
Call = Callable[[], object]


def seconds(call: Call) -> float:
    """One call's time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_growth_bytes(call: Call) -> int:
    """How much more memory the process holds at most while `call` runs, read every half millisecond."""
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes() - before)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return peak


def calls(batch: int) -> dict[str, Call]:
    """What is compared, on the same images."""
    images = smooth_images(batch, 224)
    generator = torch.Generator().manual_seed(0)
    config, raw = MaskingConfig(strategy="cluster"), MaskingConfig(strategy="cluster", similarity="raw")
    return {
        "ours": lambda: choose_patches(PatchedImages(images, PATCH_SIZE), config, generator),
        "raw": lambda: choose_patches(PatchedImages(images, PATCH_SIZE), raw, generator),
        "reference": lambda: reference_op(images, PATCH_SIZE),
        "patchify alone": lambda: patchify(images, PATCH_SIZE),
    }


def _peak_of(name: str, batch: int) -> int:
    return peak_growth_bytes(calls(batch)[name])


def peaks(batch: int) -> dict[str, int]:
    """Peak growth of each in a process of its own, in its first call: no memory kept from an earlier one hides it."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(_peak_of, (name, batch)) for name in ("ours", "reference", "patchify alone")}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    compared = calls(options.batch)
    step = packed_step("ViT-B-16", make_batch(16, 224), "cluster")
    step()  # warm
    times: dict[str, list[float]] = {name: [] for name in (*compared, "step")}
    for number in range(options.rounds):
        for name in [*compared][number % len(compared) :] + [*compared][: number % len(compared)]:
            times[name].append(seconds(compared[name]) / options.batch)
        times["step"].append(seconds(step) / 16)
    medians_us = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    over_reference = statistics.median(a / b for a, b in zip(times["ours"], times["reference"], strict=True))
    raw_over_normalized = statistics.median(a / b for a, b in zip(times["raw"], times["ours"], strict=True))
    peak = peaks(options.batch)
    figures = {
        "us_per_image": round(medians_us["ours"], 1),
        "share_of_step": round(medians_us["ours"] / medians_us["step"], 5),
        "over_reference": round(over_reference, 4),
        "raw_over_normalized": round(raw_over_normalized, 4),
        "peak_bytes": peak["ours"],
        "reference_us_per_image": round(medians_us["reference"], 1),
        "reference_peak_bytes": peak["reference"],
        "patchify_us_per_image": round(medians_us["patchify alone"], 1),
        "step_us_per_image": round(medians_us["step"], 1),
        "batch": options.batch,
    }
    for name, value in figures.items():
        print(f"{name}: {value:,}")
    command = f"python benchmarks/masking_cost.py --batch {options.batch} --rounds {options.rounds}"
    print(record("masking_cost", figures, command, options.rounds))


if __name__ == "__main__":
    main()
