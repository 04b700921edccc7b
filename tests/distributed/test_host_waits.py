"""How often DeepSpeed makes the host wait for the device in a step, by stage and precision (ds_configs/README.md).

Counted on a CPU, where an operation that gives the host a value, or takes a new one from it, is one that would wait.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from forked_ranks import run_ranks
from small_problem import start_engine, train_engine
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.ranks import Ranks
from pipeline.training.engines.engine import release

WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh")
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
    ("zero3_bf16", [], 3),  # one, and one for each group of parameters
    ("zero3_bf16", ["train.precision=autocast"], 3),
]


class CountWaits(TorchDispatchMode):
    """Counts what would wait while updates are made."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def count_waits(ranks: Ranks) -> list[int]:
    logging.disable()
    found = []
    for template, options, _ in CASES:
        engine = start_engine(ranks, template, options)
        update, backward, counts = engine.step, engine.backward, CountWaits()

        def counted(function: Any, counts: CountWaits = counts) -> Any:
            def call(*args: Any) -> None:
                with counts:
                    function(*args)

            return call

        next(iter(train_engine(engine, ranks, 1)))  # what is made in the first step stays
        engine.step, engine.backward = counted(update), counted(backward)
        list(train_engine(engine, ranks, 2))
        found.append(sum(counts.waits.values()) / 2)
        release(engine)
    return found


@pytest.mark.slow
def test_backward_and_update_wait_as_often_as_the_documentation_says() -> None:
    found = run_ranks(count_waits, 2)[0]
    assert [(*case[:2], waits) for case, waits in zip(CASES, found, strict=True)] == CASES
