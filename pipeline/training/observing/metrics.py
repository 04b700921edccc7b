"""The steps between two lines of metrics: what they report, where their time went, how fast they were."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from model.flops import masked_word_flops, step_flops
from pipeline.hardware import accelerator_of
from pipeline.ranks import Ranks
from pipeline.training.stage_plan import Stage
from pipeline.training.step_report import CONCEPT_NAMES, OPTIONAL_NAMES, REPORT_NAMES, WORD_NAMES, StepReport


class MetricsWindow:
    """Sums on the device, so that nothing waits for it before the line is written.

    save_s: time of saves in this window; like other pauses, it is no time of steps
    """

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self.save_s = 0.0
        self._stage = stage
        self._ranks = ranks
        self._steps = 0
        self._names = _names_of(stage)
        self._sums = torch.zeros(len(self._names), device=ranks.device)
        self._is_loss = torch.arange(len(self._names), device=ranks.device) == 0
        self._skipped = torch.zeros((), device=ranks.device)
        self._grad_norm = torch.zeros((), device=ranks.device)
        self._start_s = time.perf_counter()
        self._paused_s = 0.0
        self._data_wait_s = 0.0

    def add(self, report: StepReport, data_wait_s: float) -> None:
        """One step's, and how long it waited for its data; the loss of one that was skipped does not count."""
        self._data_wait_s += data_wait_s
        self._sums += torch.where(self._is_loss & (report.skipped > 0), 0, report.means_R)
        self._skipped += report.skipped
        self._grad_norm = report.grad_norm
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step: it has no part in the speeds."""
        start_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start_s

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, a pause of its own kind."""
        paused_before_s = self._paused_s
        with self.paused():
            yield
        self.save_s += self._paused_s - paused_before_s

    def close(self) -> dict[str, Any]:
        """Means over all ranks and the window's steps by name, None where there is no number; waits for the device."""
        counts = self._steps - self._skipped * self._is_loss
        grad_norm = self._grad_norm.item()  # waits for the device, so that the time is that of finished work
        seconds = time.perf_counter() - self._start_s - self._paused_s
        *means, skipped = self._ranks.mean(torch.cat((self._sums / counts, self._skipped.view(1)))).tolist()
        report: dict[str, float | None] = {**dict.fromkeys(REPORT_NAMES), "image_tokens": 0.0}
        report |= zip(self._names, means, strict=True)
        for name in report.keys() & {"loss", *OPTIONAL_NAMES}:
            report[name] = None if math.isnan(report[name] or 0.0) else report[name]
        return {
            **report,
            "skipped_steps": round(skipped),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **self._speeds(report, seconds),
            "data_wait_share": self._data_wait_s / seconds,
            "seconds_per_step": seconds / self._steps,
        }

    def _speeds(self, report: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Samples, tokens and operations per second of all ranks, and the share of the hardware's that is used (MFU).

        Operations are those of the model on the tokens that were encoded (model/flops.py); what checkpointing or cached
        gradients compute twice counts once.
        """
        plan, world_size = self._stage.batches, self._ranks.world_size
        micro_batches_per_s = self._steps * plan.accumulation_steps * world_size / seconds
        flops_per_s = micro_batches_per_s * _micro_batch_flops(self._stage, report)
        peak = _peak_flops_per_s(self._ranks.device)
        return {
            "samples_per_s": self._steps * plan.global_batch_size / seconds,
            "tokens_per_s": (report["image_tokens"] + report["text_tokens"]) * micro_batches_per_s,
            "flops_per_s": flops_per_s,
            "mfu": None if peak is None else flops_per_s / world_size / peak,
        }


def _names_of(stage: Stage) -> tuple[str, ...]:
    if stage.masks_words:
        return WORD_NAMES
    return REPORT_NAMES + (CONCEPT_NAMES if stage.num_predicted else ())


def _micro_batch_flops(stage: Stage, report: Mapping[str, Any]) -> int:
    """With every image and caption of the mean length: attention's squares alone know the difference."""
    B = stage.batches.micro_batch_size
    lengths = [round(report["text_tokens"] / B)] * B
    if stage.masks_words:
        return masked_word_flops(stage.model.text, lengths, round(report["mlm_tokens"]))
    patches_kept = round(report["image_tokens"] / B) - 1
    return step_flops(stage.model, [patches_kept] * B, lengths)


def _peak_flops_per_s(device: torch.device) -> float | None:
    """In half precision; None for a CPU, and for a device whose figures are not known."""
    if device.type != "cuda":
        return None
    accelerator = accelerator_of(torch.cuda.get_device_name(device))
    return None if accelerator is None else accelerator.bf16_flops_per_s
