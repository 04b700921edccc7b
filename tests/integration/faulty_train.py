"""pipeline/train.py with faults at given steps, for start_program: FAULTS is JSON, {"nan": [[step, rank], …], …}.

Steps count from 0: a fault at step 3 finds three steps done, logged and saved, however slow the machine or the test is.
nan: an image's feature is none
spike: images are projected to where they do not belong, and the temperature is low, for that step
flip: a weight changes on one rank alone
kill, terminate, freeze: the rank sends itself SIGKILL, SIGTERM or SIGSTOP before it takes the step
slow_worker: a loader process never returns that step's batch
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from forked_ranks import Program, start_program
from torch import Tensor

from pipeline import train
from pipeline.data import data_loader
from pipeline.training.step_report import StepReport
from pipeline.training.train_step import Learner

_SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "freeze": signal.SIGSTOP}

Faults = dict[str, list[tuple[int, int]]]


def start(options: Sequence[str], run: Path, world_size: int, faults: Faults) -> Program:
    """A run with faults; what its ranks write is beside it."""
    output = run.with_name(f"{run.name}_output")
    return start_program(main, [*options, f"train.output={run}"], world_size, output, {"FAULTS": json.dumps(faults)})


def main(arguments: Sequence[str]) -> int:
    """Train as pipeline/train.py does."""
    from pipeline.training import trainer

    faults = {kind: [tuple(at) for at in places] for kind, places in json.loads(os.environ["FAULTS"]).items()}
    rank, undisturbed_step = int(os.environ["RANK"]), trainer.train_step

    def train_step(learner: Learner, micro_batches: Any, step: int, *others: Any) -> StepReport:
        clip = learner.engine.module
        hooks = []
        if (step, rank) in faults.get("nan", []):
            hooks.append(clip.visual.register_forward_hook(_nan_in_second_row))
        if (step, rank) in faults.get("spike", []):
            with torch.no_grad():
                clip.logit_scale.fill_(4.6)
                clip.visual.proj.mul_(-1)
        for kind, number in _SIGNALS.items():
            if (step, rank) in faults.get(kind, []):
                os.kill(os.getpid(), number)
        report = undisturbed_step(learner, micro_batches, step, *others)
        if (step, rank) in faults.get("flip", []):
            with torch.no_grad():
                next(clip.parameters()).mul_(1.01)
        for hook in hooks:
            hook.remove()
        return report

    trainer.train_step = train_step
    data_loader.collate = _slow_collate(
        {step for step, slow_rank in faults.get("slow_worker", []) if slow_rank == rank}
    )
    return train.main(arguments)


def _slow_collate(steps: set[int]) -> Callable[[list[Any]], Any]:
    """For a loader with one process and one micro-batch a step."""
    collate, calls = data_loader.collate, itertools.count()

    def slow(samples: list[Any]) -> Any:
        if next(calls) in steps:
            time.sleep(1000)
        return collate(samples)

    return slow


def _nan_in_second_row(module: torch.nn.Module, inputs: Any, features_BD: Tensor) -> Tensor:
    spoilt_BD = features_BD.clone()
    spoilt_BD[1] = float("nan")
    return spoilt_BD
