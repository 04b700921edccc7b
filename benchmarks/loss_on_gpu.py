"""On a GPU: time and peak memory of the contrastive loss: fused kernels, torch's tiles, the matrix of logits.

    python benchmarks/loss_on_gpu.py [--pairs 4096 16384 65536] [--width 512] [--rounds 10]

The matrix is used as in open_clip's ClipLoss, in fp32 and, as under its bf16 autocast, with products in bf16. Calls are
interleaved; times are medians on the device. Peak memory is what is allocated beyond the features. What does not fit is
recorded as such. --device cpu tries the script, without the fused kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_throughput import made_with_peak, seconds
from loss_memory import Loss, make_leaves, open_clip_loss
from record import record
from torch import Tensor

from model.loss import ContrastiveLoss, TorchTiles, make_tiles


def open_clip_bf16(*leaves: Tensor) -> Tensor:
    """InfoNCE on two matrices of logits whose products are in bf16."""
    with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
        return open_clip_loss(*leaves)


def arms(device: torch.device) -> dict[str, Loss]:
    """What is compared."""
    info_nce = {"info_nce": make_tiles(device), "info_nce_torch": TorchTiles(4096)}
    return {
        **{name: lambda *x, tiles=tiles: ContrastiveLoss(tiles=tiles)(*x[:3]) for name, tiles in info_nce.items()},
        "sigmoid": ContrastiveLoss("sigmoid", tiles=make_tiles(device)),
        "open_clip": open_clip_loss,
        "open_clip_bf16": open_clip_bf16,
    }


def measure(pairs: int, width: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Figures of all arms at one batch size."""
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in make_leaves(pairs, width)]

    def step_of(loss_of: Loss) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss_of(*leaves).backward()

    steps, figures = {}, {}
    for name, loss_of in arms(device).items():
        for leaf in leaves:
            leaf.grad = None  # of the arm before: it would count as there already
        try:
            steps[name], peak_bytes = made_with_peak(lambda f=loss_of: lambda: step_of(f), device)
            figures[name] = {"peak_bytes": peak_bytes}
        except torch.OutOfMemoryError:
            figures[name] = {"fits": False}
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    for name, values in times.items():
        figures[name]["ms"] = round(statistics.median(values) * 1e3, 3)
    return figures


def main() -> None:
    """Measure every batch size and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=int, default=[4096, 16384, 65536])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda", help="cpu tries the script, with few pairs")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; --device cpu --pairs 512 tries the script")
    figures: dict[str, Any] = {"width": options.width}
    for pairs in options.pairs:
        figures[str(pairs)] = measure(pairs, options.width, options.rounds, device)
        print(pairs, figures[str(pairs)], flush=True)
    if device.type == "cuda":
        figures["device"] = torch.cuda.get_device_name(device)
        command = f"python benchmarks/loss_on_gpu.py --width {options.width}"
        print(record("loss_on_gpu", figures, command, options.rounds))


if __name__ == "__main__":
    main()
