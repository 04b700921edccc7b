"""How often DeepSpeed makes the host wait for the device in a step, by stage and precision (ds_configs/README.md).

Counted on a CPU (benchmarks/operations.py).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import run_ranks
from operations import CountOperations, counting_synchronization
from small_problem import start_engine, train_engine

from pipeline.ranks import Ranks

STEPS = 4
# template, options, waits in a step
CASES = [
    ("zero0_fp32", [], 0),
    ("zero0_fp32", ["train.precision=autocast"], 0),
    ("zero1_bf16", [], 0),
    ("zero2_bf16", [], 0),
    ("zero1_bf16", ["optimizer.name=muon"], 0),
    ("zero1_bf16", ["optimizer.max_grad_norm=0"], 0),
    ("zero1_fp32", [], 0),
    ("zero2_bf16", ["train.precision=autocast"], 0),
    ("sums_in_fp32", [], 2),
    ("zero3_bf16", [], 3),  # one, and one for each group of parameters
    ("zero3_bf16", ["train.precision=autocast"], 3),
]


def count_waits(ranks: Ranks, sums_in_fp32: str) -> list[float]:
    logging.disable()
    found = []
    for name, options, _ in CASES:
        template = sums_in_fp32 if name == "sums_in_fp32" else name
        engine, waits = start_engine(ranks, template, options), Counter[str]()

        def counted(function: Any, waits: Counter[str] = waits) -> Any:
            def call(*args: Any) -> Any:
                with CountOperations() as counts:
                    found = function(*args)
                waits.update(counts.waits)
                return found

            return call

        next(iter(train_engine(engine, ranks, 1)))  # what is made in the first step stays
        for name in ("backward", "gradient_norm", "update"):
            setattr(engine, name, counted(getattr(engine, name)))
        list(train_engine(engine, ranks, STEPS))
        found.append(waits.total() / STEPS)
        engine.release()
    return found


@pytest.mark.slow
def test_a_step_waits_as_often_as_the_documentation_says(tmp_path: Path) -> None:
    sums_in_fp32 = tmp_path / "sums_in_fp32.json"  # as stage 1 has them with more than eight micro-batches
    blocks = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    sums_in_fp32.write_text(json.dumps(blocks))
    found = run_ranks(count_waits, 2, str(sums_in_fp32))[0]
    assert [(*case[:2], waits) for case, waits in zip(CASES, found, strict=True)] == CASES


def count_timer_waits(ranks: Ranks) -> int:
    """Of DeepSpeed's own timer, which is on unless it is told otherwise."""
    from deepspeed.utils.timer import ThroughputTimer

    engine = start_engine(ranks, "zero1_fp32", [])
    timer = engine.deepspeed.tput_timer
    assert isinstance(timer, ThroughputTimer)
    timer.config.enabled = True
    with counting_synchronization() as waits:
        list(train_engine(engine, ranks, STEPS))
    return waits["synchronize"]


@pytest.mark.slow
def test_waits_of_timers_are_counted() -> None:
    assert run_ranks(count_timer_waits, 1)[0] >= 2
