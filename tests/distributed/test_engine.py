"""Every template and precision trains in two ranks as one process with plain torch does on the concatenated batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from small_problem import make_clip, reference_step, start_engine, train_engine

from pipeline.ranks import Ranks, init_ranks

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A template with options, and how far its losses may be from fp32's."""

    template: str
    tolerance: float
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.template, *self.options))


FP32, AUTOCAST = ("train.precision=fp32",), ("train.precision=autocast",)
CASES = [
    Case("zero0_fp32", 2e-5),
    Case("zero0_fp32", 2e-2, AUTOCAST),
    Case("zero1_bf16", 3e-2),
    Case("zero1_bf16", 2e-2, AUTOCAST),
    Case("zero1_fp32", 2e-5),
    Case("zero2_bf16", 3e-2),
    Case("zero2_bf16", 2e-2, AUTOCAST),
    Case("zero2_bf16", 2e-5, FP32),
    Case("zero2_bf16_offload", 3e-2),
    Case("zero2_bf16_offload", 2e-5, FP32),
    Case("zero3_bf16", 3e-2),
    Case("zero3_bf16", 2e-2, AUTOCAST),
    Case("zero3_bf16", 2e-5, FP32),
    Case("zero3_bf16_offload", 3e-2),
    Case("zero3_bf16_offload", 2e-5, FP32),
]


OPTIONS = ["optimizer.lr=1e-3", "optimizer.weight_decay=0.2", "optimizer.max_grad_norm=1"]


def reference_losses() -> list[float]:
    """One process, fp32, torch's own AdamW and clipping."""
    clip = make_clip()
    named = [(name.replace("patch_embedding", "patch"), p) for name, p in clip.named_parameters()]
    matrices = [p for name, p in named if p.ndim > 1 and "embedding" not in name]
    others = [p for p in clip.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    losses = []
    for step in range(STEPS):
        losses.append(reference_step(clip, step, max_grad_norm=1.0))
        optimizer.step()
    return losses


def train(ranks: Ranks, case: Case) -> list[float]:
    engine = start_engine(ranks, case.template, [*OPTIONS, *case.options])
    losses = list(train_engine(engine, ranks, STEPS))
    engine.release()
    return losses


def train_all(ranks: Ranks) -> dict[str, Any]:
    logging.disable()
    return {case.name: train(ranks, case) for case in CASES}


@pytest.fixture(scope="module")
def losses() -> dict[str, Any]:
    return run_ranks(train_all, 2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_train_as_one_process(case: Case, losses: dict[str, Any]) -> None:
    expected = reference_losses()
    assert expected[0] - expected[1] > 10 * case.tolerance  # else a wrong update would not show
    assert losses[case.name] == pytest.approx(expected, abs=case.tolerance)


@pytest.fixture(scope="module")
def gpu_ranks() -> Iterator[Ranks]:
    """A world of one; DeepSpeed holds on to the first that a process makes, so all cases share it."""
    yield init_ranks()
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "autocast"])
def test_a_gpu_trains_as_a_cpu_does(stage: int, precision: str, tmp_path: Path, gpu_ranks: Ranks) -> None:
    template = tmp_path / "template.json"
    # a scale that overflows in no step: otherwise the first steps would be skipped
    blocks = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": precision == "fp16", "initial_scale_power": 8}}
    template.write_text(json.dumps(blocks))
    losses = train(gpu_ranks, Case(str(template), 3e-2, (f"train.precision={precision}",)))
    assert losses == pytest.approx(reference_losses(), abs=3e-2)
