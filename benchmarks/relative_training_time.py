"""Time of a whole training step relative to open_clip's own unmasked model, on the same images and captions.

Run in the environment that has open_clip (`make peers`); this project's `model` package needs torch alone:

    .peers/bin/python benchmarks/relative_training_time.py [--models ViT-B-16 ViT-S-16] [--batch 16] [--rounds 9]
                                                           [--data FOLDER]

A step is forward, backward and fused AdamW in bf16 autocast. Arms are interleaved, their order rotates, and each figure
is the median over rounds of the ratio to open_clip within the round. Beside it stands the ratio of floating-point
operations, which does not depend on the machine. `over_none` compares with this project's own unmasked model, so that
the gain of packing text is not taken for that of masking. `reference` is the released cluster-masking code's scheme in
open_clip's model. FOLDER holds pairs, name.jpg and name.txt; without it images and captions are made up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision_cpu  # noqa: F401  makes torchvision importable on a CPU build
from open_clip import ClipLoss, create_model, create_model_and_transforms, get_tokenizer
from record import record
from reference_scheme import reference_image_features
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from training_steps import Step, TrainingBatch, make_batch, packed_step, read_batch, train_with

IMAGE_SIZE = 224


def open_clip_step(name: str, batch: TrainingBatch, patch_dropout: float = 0.0) -> Step:
    """open_clip's model, padded text, its own patch dropout."""
    model = create_model(name, force_patch_dropout=patch_dropout).train()
    loss = ClipLoss()
    return train_with(model, lambda: loss(*model(batch.images_BCHW, batch.tokens_BT)[:3]))


def reference_step(name: str, batch: TrainingBatch) -> Step:
    """open_clip's model with the released code's masking."""
    model = create_model(name).train()
    loss = ClipLoss()

    def loss_of() -> torch.Tensor:
        image_features = normalize(reference_image_features(model.visual, batch.images_BCHW), dim=-1)
        return loss(image_features, model.encode_text(batch.tokens_BT, normalize=True), model.logit_scale.exp())

    return train_with(model, loss_of)


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
            "lower_quartile": round(statistics.quantiles(ratios[name], n=4)[0], 3),
            "upper_quartile": round(statistics.quantiles(ratios[name], n=4)[2], 3),
            "flops": round(operations[name] / operations[names[0]], 3),
        }
        for name in names
    }


def measure_model(name: str, batch: TrainingBatch, rounds: int) -> dict[str, dict[str, float]]:
    """All arms of one model."""
    print(f"{name}, {len(batch.lengths_B)} pairs, {batch.caption_tokens:.1f} tokens a caption", flush=True)
    return measure(
        {
            "open_clip": open_clip_step(name, batch),
            "open_clip_patch_dropout_0.5": open_clip_step(name, batch, 0.5),
            "reference": reference_step(name, batch),
            "none": packed_step(name, batch, "none"),
            "random_0.5": packed_step(name, batch, "random"),
            "cluster_0.5": packed_step(name, batch, "cluster"),
        },
        rounds,
    )


def main() -> None:
    """Measure the arms of the models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-16", "ViT-S-16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="pairs of name.jpg and name.txt")
    options = parser.parse_args()
    batch = make_batch(options.batch, IMAGE_SIZE)
    if options.data:
        _, _, preprocess = create_model_and_transforms(options.models[0])
        batch = read_batch(options.data, options.batch, preprocess, get_tokenizer(options.models[0]))
    measured = {name: measure_model(name, batch, options.rounds) for name in options.models}
    result: dict[str, Any] = {name: {arm: v["time"] for arm, v in arms.items()} for name, arms in measured.items()}
    result["over_none"] = {
        name: {arm: round(arms[arm]["time"] / arms["none"]["time"], 3) for arm in ("random_0.5", "cluster_0.5")}
        for name, arms in measured.items()
    }
    result["flops"] = {name: {arm: v["flops"] for arm, v in arms.items()} for name, arms in measured.items()}
    result["quartiles"] = {
        name: {arm: [v["lower_quartile"], v["upper_quartile"]] for arm, v in arms.items()}
        for name, arms in measured.items()
    }
    result |= {"mean_caption_tokens": batch.caption_tokens, "batch": options.batch}
    result["data"] = "real photographs and captions" if options.data else "made up"
    for name, arms in measured.items():
        print(name, *(f"{arm} {v['time']} ({v['flops']})" for arm, v in arms.items()), sep="\n  ")
    command = ".peers/bin/python benchmarks/relative_training_time.py" + (" --data FOLDER" if options.data else "")
    print(record("relative_training_time", result, command, options.rounds))


if __name__ == "__main__":
    main()
