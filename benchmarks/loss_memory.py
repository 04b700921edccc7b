"""Memory and time of the contrastive loss, forward and backward, against the whole matrix of logits.

    python benchmarks/loss_memory.py [--width 512] [--rounds 3]

The matrix is used as in open_clip's ClipLoss: a product for each direction, then cross-entropy. Peak memory is the
growth of a process of its own beyond what it held with the features in place (VmHWM - VmRSS). `peak_share_at_32k` is
the peak at 32,768 pairs over a single matrix in fp32, 4 GiB; the gradients of the features alone are 3 % of that. What
open_clip takes is measured up to 16,384 pairs, and taken for four times as much at 32,768. `time_ratio_at_8k` is the
median of the ratios of neighbouring calls, in CPU time on one thread, which other load on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from model.loss import ContrastiveLoss

Loss = Callable[..., Tensor]
K = 1024
GIB = 2**30


def open_clip_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    """InfoNCE on two matrices of logits."""
    target_B = torch.arange(len(image_BD), device=image_BD.device)
    per_image_BB = scale * image_BD @ text_BD.T
    per_text_BB = scale * text_BD @ image_BD.T
    return (F.cross_entropy(per_image_BB, target_B) + F.cross_entropy(per_text_BB, target_B)) / 2


LOSSES: dict[str, Loss] = {
    "info_nce": lambda image, text, scale, _: ContrastiveLoss("info_nce")(image, text, scale),
    "sigmoid": ContrastiveLoss("sigmoid"),
    "open_clip": open_clip_loss,
}
PEAKS = [("info_nce", 8), ("info_nce", 16), ("info_nce", 32), ("sigmoid", 16), ("open_clip", 8), ("open_clip", 16)]


def make_leaves(pairs: int, width: int) -> list[Tensor]:
    """Features of unit length, made in place, so that nothing before the loss takes more memory than they do."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.empty(pairs, width) for _ in range(2)]
    for side_BD in features:
        for part_bD in side_BD.split(K):
            part_bD.normal_(generator=generator)
            part_bD /= part_bD.norm(dim=-1, keepdim=True)
    features[1].mul_(0.9).add_(features[0], alpha=0.1)  # pairs are a little alike
    return [leaf.requires_grad_() for leaf in (*features, torch.tensor([20.0]), torch.tensor([-10.0]))]


def forward_backward_s(loss_of: Loss, leaves: list[Tensor]) -> float:
    """One call's CPU time."""
    for leaf in leaves:
        leaf.grad = None
    start_s = time.process_time()
    loss_of(*leaves).backward()
    return time.process_time() - start_s


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _peak_bytes(name: str, pairs: int, width: int) -> int:
    torch.set_num_threads(1)
    forward_backward_s(LOSSES[name], make_leaves(64, width))  # what libraries take once
    leaves = make_leaves(pairs, width)
    before = _status_bytes("VmRSS")
    forward_backward_s(LOSSES[name], leaves)
    return _status_bytes("VmHWM") - before


def peaks_bytes(width: int) -> dict[str, dict[str, int]]:
    """Peak growth of each of PEAKS in a process of its own, by loss and thousands of pairs."""
    found: dict[str, dict[str, int]] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, thousands in PEAKS:
            peak = pool.apply(_peak_bytes, (name, thousands * K, width))
            print(f"{name} at {thousands}k: {peak / 2**20:,.0f} MiB", flush=True)
            found.setdefault(name, {})[f"{thousands}k"] = peak
    return found


def times_s(pairs: int, width: int, rounds: int) -> dict[str, list[float]]:
    """CPU time of interleaved calls on one thread."""
    torch.set_num_threads(1)
    leaves = make_leaves(pairs, width)
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(rounds):
        for name, loss_of in LOSSES.items():
            found[name].append(forward_backward_s(loss_of, leaves))
    return found


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times = times_s(8 * K, options.width, options.rounds)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["open_clip"], strict=True)) for name in times
    }
    print({name: f"{statistics.median(values):.2f} s" for name, values in times.items()}, flush=True)
    peak = peaks_bytes(options.width)
    ours, theirs = peak["info_nce"], peak["open_clip"]
    figures = {
        "peak_share_at_32k": round(ours["32k"] / (4 * GIB), 4),
        "peak_share_of_open_clip": {
            "8k": round(ours["8k"] / theirs["8k"], 4),
            "16k": round(ours["16k"] / theirs["16k"], 4),
            "32k_estimated": round(ours["32k"] / (4 * theirs["16k"]), 4),
        },
        "time_ratio_at_8k": round(ratios["info_nce"], 3),
        "time_ratio_at_8k_sigmoid": round(ratios["sigmoid"], 3),
        "cpu_seconds_at_8k": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "peak_bytes": peak,
        "width": options.width,
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    command = f"python benchmarks/loss_memory.py --width {options.width} --rounds {options.rounds}"
    print(record("loss_memory", figures, command, options.rounds))


if __name__ == "__main__":
    main()
