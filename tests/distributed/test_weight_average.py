"""The average of weights that ranks have shares of, against one that is computed from whole weights after each step."""

from __future__ import annotations

import logging

import torch
from forked_ranks import run_ranks
from small_problem import start_engine, train_engine
from torch import Tensor

from pipeline.ranks import Ranks
from pipeline.training.engines.weight_average import WeightAverage

STEPS, DECAY = 4, 0.2
CASES = {
    "zero0": ("zero0_fp32", []),
    "zero1": ("zero1_bf16", []),
    "zero2 offloaded": ("zero2_bf16_offload", []),
    "zero3": ("zero3_bf16", []),
    "frozen": ("zero1_bf16", ["optimizer.text_lr_ratio=0"]),
}


def average_weights(ranks: Ranks) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """(average, expected) by parameter, of each case; raises where asking for it changes weights or average."""
    logging.disable()
    found = {}
    for case, (template, options) in CASES.items():
        engine = start_engine(ranks, template, ["optimizer.lr=0.01", *options])
        average = WeightAverage(engine, DECAY, 0, ranks)
        expected = engine.weights(ranks)
        for step, _ in enumerate(train_engine(engine, ranks, STEPS), start=1):
            average.update(step - 1)
            decay = min(DECAY, step / (step + 9))  # 0.1, 0.18, then 0.2
            for name, weights in engine.weights(ranks).items():
                expected[name] = decay * expected[name] + (1 - decay) * weights
        before, state = engine.weights(ranks), average.state()
        assert all(torch.equal(before[name], after) for name, after in engine.weights(ranks).items())

        shared = [{name: value + 1 for name, value in state.items()}]
        torch.distributed.broadcast_object_list(shared)
        average.load_state(shared[0])
        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        for name, value in average.state().items():
            assert torch.equal(value, shared[0][name] if name in trained else before[name])
        found[case] = {name: (value, expected[name]) for name, value in state.items()}
        engine.release()
    return found


def test_shares_of_an_average_are_the_average() -> None:
    found = run_ranks(average_weights, 2)[0]
    assert list(found) == list(CASES)
    for case, weights in found.items():
        for name, (average, expected) in weights.items():
            assert torch.allclose(average, expected, atol=1e-6), (case, name)
