"""From what a window of steps left behind to a line of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from model.flops import step_flops
from pipeline.hardware import accelerator_of
from pipeline.ranks import Ranks
from pipeline.training.stage_plan import Stage
from pipeline.training.train_step import OPTIONAL_NAMES, REPORT_NAMES

NAMES = (*REPORT_NAMES, "skipped_steps")


def report_of(values: list[float]) -> dict[str, float | None]:
    """Means over the window by name; None where there is no number."""
    report: dict[str, float | None] = dict(zip(NAMES, values, strict=True))
    for name in ("loss", *OPTIONAL_NAMES):
        value = report[name]
        if value is not None and math.isnan(value):
            report[name] = None
    return report


def speeds(stage: Stage, report: Mapping[str, Any], steps: int, seconds: float, ranks: Ranks) -> dict[str, Any]:
    """Samples, tokens and operations per second of all ranks, and the share of the hardware's that is used (MFU).

    Operations are those of the model on the tokens that were encoded (model/flops.py); what checkpointing or cached
    gradients compute twice counts once.
    """
    plan = stage.batches
    micro_batches_per_s = steps * plan.accumulation_steps * ranks.world_size / seconds
    flops_per_s = micro_batches_per_s * _micro_batch_flops(stage, report)
    peak = _peak_flops_per_s(ranks.device)
    return {
        "samples_per_s": steps * plan.global_batch_size / seconds,
        "tokens_per_s": (report["image_tokens"] + report["text_tokens"]) * micro_batches_per_s,
        "flops_per_s": flops_per_s,
        "mfu": None if peak is None else flops_per_s / ranks.world_size / peak,
    }


def _micro_batch_flops(stage: Stage, report: Mapping[str, Any]) -> int:
    """With every image and caption of the mean length: attention's squares alone know the difference."""
    B = stage.batches.micro_batch_size
    patches_kept = round(report["image_tokens"] / B) - 1
    return step_flops(stage.model, [patches_kept] * B, [round(report["text_tokens"] / B)] * B)


def _peak_flops_per_s(device: torch.device) -> float | None:
    """In half precision; None for a CPU, and for a device whose figures are not known."""
    if device.type != "cuda":
        return None
    accelerator = accelerator_of(torch.cuda.get_device_name(device))
    return None if accelerator is None else accelerator.bf16_flops_per_s
