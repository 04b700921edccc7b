"""Memory of one rank by DeepSpeed template and precision, on 1, 2 and 4 ranks of this machine's CPU.

    python benchmarks/engine_memory.py [--models ViT-tiny-16 ViT-S-16] [--ranks 1 2 4]

Counted are the bytes of tensors in a run without a batch to speak of (2 pairs a rank): `states_bytes` of all tensors
that Python knows between steps (weights, master weights, moments), `peak_bytes` of all allocations at any time: with
gradients and the buckets in which they are averaged, and up to the gradients' size too much, where gloo's threads
release them. A GPU holds the same tensors, but for what is offloaded: here that counts too.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import multiprocessing
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import record

ARMS: dict[str, tuple[str, list[str]]] = {
    "zero0_fp32": ("zero0_fp32", []),
    "zero0_fp32, autocast": ("zero0_fp32", ["train.precision=autocast"]),
    "zero1_fp32": ("zero1_fp32", []),
    "zero1_bf16": ("zero1_bf16", []),
    "zero1_bf16, autocast": ("zero1_bf16", ["train.precision=autocast"]),
    "zero1_bf16, muon": ("zero1_bf16", ["optimizer.name=muon"]),
    "zero1_bf16, image tower frozen": ("zero1_bf16", ["optimizer.image_lr_ratio=0"]),
    "zero2_bf16": ("zero2_bf16", []),
    "zero2_bf16_offload": ("zero2_bf16_offload", []),
    "zero3_bf16": ("zero3_bf16", []),
    "zero3_bf16_offload": ("zero3_bf16_offload", []),
}
PAIRS, TOKENS = 2, 8


def measure(model: str, template: str, options: Sequence[str], ranks: Any) -> dict[str, int]:
    """Bytes of this rank over two steps of `PAIRS` whole images and short captions."""
    import torch

    from model.clip import CLIP
    from model.config import config_from_name
    from model.packing import PackedTokens, keep_all
    from pipeline.data.sample_order import BatchPlan
    from pipeline.planning.measurement import TensorMemory
    from pipeline.recipe_files import load_recipe
    from pipeline.training.engines.engine import make_engine
    from pipeline.training.engines.engine_config import deepspeed_config
    from pipeline.training.step_loss import make_step_loss

    recipe = load_recipe("base", [*options, f"model.name={model}"])
    plan = BatchPlan(1000, PAIRS * ranks.world_size, PAIRS, ranks.world_size)
    config = config_from_name(model)
    vision, end = config.vision, config.text.eot_token_id
    with TensorMemory() as memory:
        engine = make_engine(CLIP(config), recipe, deepspeed_config(recipe, plan, template), ranks)
        step_loss = make_step_loss(recipe.loss, ranks)
        for _ in range(2):
            patches = torch.randn(PAIRS * vision.num_patches, 3 * vision.patch_size**2)
            tokens = torch.tensor([[1] * (TOKENS - 1) + [end]] * PAIRS)
            output = engine(
                patches, keep_all(PAIRS, vision.num_patches, patches.device), PackedTokens.from_padded(tokens, end)
            )
            loss = step_loss.pairs(*output.for_pairs)
            engine.backward(loss)
            engine.update(None, torch.zeros(()))
            del patches, tokens, output, loss
    return {"states_bytes": living_bytes(), "peak_bytes": memory.peak_bytes}


def living_bytes() -> int:
    """Memory behind all tensors, views of one storage counted once."""
    import torch

    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def run_rank(rank: int, world_size: int, port: int, model: str, arm: str, results: Connection) -> None:
    """Measure one arm; the main rank sends what it found."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logging.disable()
    from pipeline.ranks import init_ranks

    ranks = init_ranks()
    figures = measure(model, *ARMS[arm], ranks)
    if ranks.is_main:
        results.send(figures)
    ranks.barrier()
    os._exit(0)  # torn down in order, ranks wait for each other's threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-tiny-16", "ViT-S-16"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed.runtime.engine", "pipeline.training.engines.engine"])
    figures: dict[str, Any] = {}
    for model, world_size, arm in itertools.product(options.models, options.ranks, ARMS):
        of_model = figures.setdefault(model, {"parameters": count(model), "arms": {}})
        measured = run_arm(context, world_size, model, arm)
        of_model["arms"].setdefault(arm, {})[f"{world_size} ranks"] = measured
        print(f"{model}, {arm}, {world_size} ranks: {measured}", flush=True)
    command = f"python benchmarks/engine_memory.py {shlex.join(sys.argv[1:])}".strip()
    print(f"written to {record('engine_memory', figures, command, repeats=1)}")


def run_arm(context: ForkServerContext, world_size: int, model: str, arm: str) -> dict[str, int]:
    """What the main rank measured; in processes of its own, where nothing is left of another arm."""
    receiver, sender = context.Pipe(duplex=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [
        context.Process(target=run_rank, args=(r, world_size, port, model, arm, sender)) for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    sender.close()
    measured: dict[str, int] = receiver.recv()  # EOFError: a rank failed, and said why
    for process in ranks:
        process.join()
    return measured


def count(model: str) -> int:
    """Parameters of a model."""
    from model.config import config_from_name
    from pipeline.training.weights.stage_model import count_parameters

    return count_parameters(config_from_name(model))


if __name__ == "__main__":
    main()
