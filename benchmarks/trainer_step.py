"""What the engine costs: a step as `pipeline/train.py` takes it, beside the bare model's; its waits and kernels.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python benchmarks/trainer_step.py [--steps ViT-B-16:16 …] [--rounds 7]

The trainer's step is `train_step` with the base recipe's engine (bf16 weights, ZeRO stage 1), from the loader's bytes
to new weights: masks, clipping and the step's report included. The bare one is forward, loss, backward and torch's
fused AdamW in bf16 autocast, and draws its masks too. Rounds are interleaved, the order rotates. `engine_over_bare` is
the median over rounds of the ratio of the seconds that a core worked, with quartiles beside it; without what training
does about memory on a CPU it is `…_as_malloc_comes`. `host_waits_per_step` and `kernels_per_step` are counts, the same
on any machine (benchmarks/operations.py).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from operations import CountOperations, without_flash_attention
from record import record
from trainer_steps import learner_of, make_stage, trainer_step
from training_steps import Step, make_batch, packed_step

from model.config import config_from_name
from pipeline import ranks as ranks_module
from pipeline.ranks import Ranks, init_ranks, keep_freed_memory

MASKS = "cluster"
_STEPS = ("ViT-B-16:16", "ViT-S-16:64")
_WARM_UP = 2  # memory grows in the first rounds


def seconds(step: Step) -> float:
    """Processor time of one step."""
    start_s = time.process_time()
    step()
    return time.process_time() - start_s


def measure(name: str, pairs: int, rounds: int, ranks: Ranks) -> list[float]:
    """Ratios of a model's two steps, one of each round."""
    batch = make_batch(pairs, config_from_name(name).vision.image_size)
    learner = learner_of(make_stage(name, pairs, MASKS), ranks)
    steps = {"engine": trainer_step(learner, batch), "bare": packed_step(name, batch, MASKS)}
    ratios = []
    for number in range(-_WARM_UP, rounds):
        names = ("engine", "bare") if number % 2 else ("bare", "engine")
        times_s = {arm: seconds(steps[arm]) for arm in names}
        print(f"{name}, {pairs} pairs: engine {times_s['engine']:.2f} s, bare {times_s['bare']:.2f} s", flush=True)
        if number >= 0:
            ratios.append(times_s["engine"] / times_s["bare"])
    learner.engine.release()
    return ratios


def count(name: str, ranks: Ranks) -> tuple[int, dict[str, int]]:
    """Waits of one step of the trainer, and kernels of it and of the bare one; a few pairs are enough."""
    batch = make_batch(4, config_from_name(name).vision.image_size)
    learner = learner_of(make_stage(name, 4, MASKS, ["model.attention=varlen"]), ranks)
    kernels = {}
    with without_flash_attention():
        for arm, step in {
            "bare": packed_step(name, batch, MASKS, backend="varlen"),
            "engine": trainer_step(learner, batch),
        }.items():
            step()  # what is made in the first step stays
            with CountOperations() as counts:
                step()
            kernels[arm] = counts.kernels.total()
    learner.engine.release()
    return counts.waits.total(), kernels


def main() -> None:
    """Measure, count, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=_STEPS, metavar="MODEL:PAIRS")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.disable()
    with mock.patch.object(ranks_module, "keep_freed_memory"):  # called below
        ranks = init_ranks()
    figures: dict[str, Any] = {
        "engine_over_bare": {},
        "quartiles": {},
        "host_waits_per_step": {},
        "kernels_per_step": {},
    }
    for step in options.steps:
        name, _, pairs = step.partition(":")
        figures["host_waits_per_step"][name], figures["kernels_per_step"][name] = count(name, ranks)
    for ending, prepare in (("_as_malloc_comes", lambda: None), ("", keep_freed_memory)):
        prepare()
        for step in options.steps:
            name, _, pairs = step.partition(":")
            lower, median, upper = statistics.quantiles(measure(name, int(pairs), options.rounds, ranks), n=4)
            figures["engine_over_bare"][name + ending] = round(median, 3)
            figures["quartiles"][name + ending] = [round(lower, 3), round(upper, 3)]
    for name, value in figures.items():
        print(name, value)
    command = "OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python benchmarks/trainer_step.py"
    print(record("trainer_step", figures, command, options.rounds))


if __name__ == "__main__":
    main()
