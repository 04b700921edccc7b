"""pipeline/train.py with faults at given steps, for start_program: FAULTS is JSON, {"nan": [[step, rank], …], …}.

nan: an image's feature is none; steps count from 0
spike: images are projected to where they do not belong, and the temperature is low, for that step
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import train


def main(arguments: Sequence[str]) -> int:
    """Train as pipeline/train.py does."""
    from pipeline.training import trainer

    faults = {kind: [tuple(at) for at in places] for kind, places in json.loads(os.environ["FAULTS"]).items()}
    rank, undisturbed_step = int(os.environ["RANK"]), trainer.train_step

    def train_step(engine: Any, *others: Any) -> Tensor:
        step = next(value for value in others if isinstance(value, int))
        hooks = []
        if (step, rank) in faults.get("nan", []):
            hooks.append(engine.module.visual.register_forward_hook(_nan_in_second_row))
        if (step, rank) in faults.get("spike", []):
            with torch.no_grad():
                engine.module.logit_scale.fill_(4.6)
                engine.module.visual.proj.mul_(-1)
        report = undisturbed_step(engine, *others)
        for hook in hooks:
            hook.remove()
        return report

    trainer.train_step = train_step
    return train.main(arguments)


def _nan_in_second_row(module: torch.nn.Module, inputs: Any, features_BD: Tensor) -> Tensor:
    spoilt_BD = features_BD.clone()
    spoilt_BD[1] = float("nan")
    return spoilt_BD
