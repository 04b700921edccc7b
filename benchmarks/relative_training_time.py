"""Time of a whole training step relative to open_clip's own unmasked model, on the same images and captions.

Run in the environment that has open_clip (`make peers`); this project's `model` package needs torch alone:

    .peers/bin/python benchmarks/relative_training_time.py [--model ViT-B-16] [--batch 16] [--rounds 5]

A step is forward, backward and fused AdamW in bf16 autocast. Arms are interleaved, their order rotates, and each figure
is the median over rounds of the ratio to open_clip within the round. Beside it stands the ratio of floating-point
operations, which does not depend on the machine. `over_none` compares with this project's own unmasked model, so that
the gain of packing text is not taken for that of masking.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision_cpu  # noqa: F401  makes torchvision importable on a CPU build
from open_clip import ClipLoss, create_model
from record import record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.clip import CLIP
from model.loss import contrastive_loss
from model.masking import MaskingConfig, choose_patches, patchify
from model.packing import PackedLayout, PackedTokens, lengths_to_cu_seqlens

Step = Callable[[], None]

# Caption lengths between 9 and 20 tokens, start and end included: 14.5 on average, as Flickr8k's have in CLIP's BPE.
SHORTEST, LONGEST, CONTEXT = 9, 20, 77
END_TOKEN = 49407


def make_batch(batch: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth random images (B, 3, S, S), padded captions (B, 77) and their lengths."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, 3, 14, 14, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (image_size, image_size), mode="bicubic")
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    lengths = torch.arange(batch) % (LONGEST - SHORTEST + 1) + SHORTEST
    tokens = torch.randint(1, 40_000, (batch, CONTEXT), generator=generator)
    tokens[torch.arange(batch), lengths - 1] = END_TOKEN
    return images, tokens * (torch.arange(CONTEXT) < lengths[:, None]), lengths


def train_with(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Step:
    """Forward, backward, update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()

    return step


def open_clip_arm(name: str, batch: int, patch_dropout: float) -> Step:
    """open_clip's model, padded text, its own patch dropout."""
    model = create_model(name, force_patch_dropout=patch_dropout).train()
    images, tokens, _ = make_batch(batch, 224)
    loss = ClipLoss()
    return train_with(model, lambda: loss(*model(images, tokens)[:3]))


def packed_arm(name: str, batch: int, strategy: str) -> Step:
    """This project's model; masks are drawn within the step."""
    clip = CLIP.from_name(name)
    images, tokens, lengths = make_batch(batch, 224)
    packed = tokens[torch.arange(CONTEXT) < lengths[:, None]]
    generator, masking = torch.Generator().manual_seed(0), MaskingConfig(strategy=strategy)

    def loss_of() -> torch.Tensor:
        patches = patchify(images, clip.config.vision.patch_size)
        selection = choose_patches(patches, masking, generator)
        text = PackedTokens(packed, PackedLayout(lengths_to_cu_seqlens(lengths), granularity=4))
        return contrastive_loss(*clip(patches, selection, text))

    return train_with(clip, loss_of)


def flops(step: Step) -> float:
    """Floating-point operations of one step, forward and backward, attention counted in the same way for all."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return float(counter.get_total_flops())


def measure(arms: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Per arm: median ratio of times and ratio of operations to the first arm, and the spread over rounds."""
    operations = {name: flops(step) for name, step in arms.items()}  # also the warm-up
    names, ratios = list(arms), {name: [] for name in arms}
    for number in range(rounds):
        seconds = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            arms[name]()
            seconds[name] = time.perf_counter() - start
        for name in names:
            ratios[name].append(seconds[name] / seconds[names[0]])
        print(f"round {number + 1}: " + "  ".join(f"{name} {seconds[name]:.2f} s" for name in names), flush=True)
    return {
        name: {
            "time": round(statistics.median(ratios[name]), 3),
            "time_lowest": round(min(ratios[name]), 3),
            "time_highest": round(max(ratios[name]), 3),
            "flops": round(operations[name] / operations[names[0]], 3),
        }
        for name in names
    }


def main() -> None:
    """Measure the arms of one model and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    arms = {
        "open_clip": open_clip_arm(options.model, options.batch, 0.0),
        "open_clip_patch_dropout_0.5": open_clip_arm(options.model, options.batch, 0.5),
        "none": packed_arm(options.model, options.batch, "none"),
        "random_0.5": packed_arm(options.model, options.batch, "random"),
        "cluster_0.5": packed_arm(options.model, options.batch, "cluster"),
    }
    figures = measure(arms, options.rounds)
    for name, values in figures.items():
        print(name, values)
    result: dict[str, Any] = {
        options.model: {name: values["time"] for name, values in figures.items()},
        "over_none": {
            name: round(figures[name]["time"] / figures["none"]["time"], 3) for name in ("random_0.5", "cluster_0.5")
        },
        "flops": {name: values["flops"] for name, values in figures.items()},
        "spread": {name: [values["time_lowest"], values["time_highest"]] for name, values in figures.items()},
        "mean_caption_tokens": (SHORTEST + LONGEST) / 2,
        "batch": options.batch,
    }
    name = "relative_training_time" + ("" if options.model == "ViT-B-16" else f"_{options.model}")
    command = f".peers/bin/python benchmarks/relative_training_time.py --model {options.model}"
    print(record(name, result, command, options.rounds))


if __name__ == "__main__":
    main()
