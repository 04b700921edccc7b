"""Started by the launcher: trains the first stage of a recipe, and says how much of it outlives it.

usage: stage_memory_worker.py section.key=value …
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from pipeline.ranks import init_ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.progress import Progress
from pipeline.training.trainer import StageTrainer
from pipeline.training.training_run import TrainingRun


def state_of(trainer: StageTrainer) -> list[weakref.ref]:
    """What takes memory: weights or this rank's part of them, and the optimiser's fp32 copies and moments."""
    engine = trainer._learner.engine.deepspeed
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    return [weakref.ref(tensor) for tensor in (*weights, *masters, *moments)]


def size_bytes(tensors: list[weakref.ref]) -> int:
    """Memory behind those that are still there, views of one storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for ref in tensors
        if (tensor := ref()) is not None
    }
    return sum(storage.nbytes() for storage in storages.values())


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    recipe = load_recipe("tiny_staged", overrides)
    ranks = init_ranks()
    Path(recipe.train.output).mkdir(exist_ok=True)
    run = TrainingRun(recipe, ranks)
    for _ in range(2):  # a second engine in the same process, as the next stage builds it
        trainer = run._begin(run._stages[0], run._configs[0], Progress(0, 0))
        trainer.train(None)
        state = state_of(trainer)
        before = size_bytes(state)
        trainer.close()
        print(f"{size_bytes(state)} of {before} bytes outlive the stage", flush=True)


if __name__ == "__main__":
    main()
