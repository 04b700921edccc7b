"""Memory of one rank by DeepSpeed template and precision, on 1, 2 and 4 ranks of this machine's CPU.

    python benchmarks/engine_memory.py [--models ViT-tiny-16 ViT-S-16] [--ranks 1 2 4]

Counted are the bytes of tensors, every allocation and release, in a run without a batch to speak of (2 pairs a rank):
`states_bytes` between steps (weights, master weights, moments), `peak_bytes` the most at any time (with gradients and
the buckets in which they are averaged). A GPU holds the same tensors, but for what is offloaded: here that counts too.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
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
    from model.masking.selection import keep_all
    from model.packing import PackedTokens
    from pipeline.data.sample_order import BatchPlan
    from pipeline.planning.measurement import TensorMemory
    from pipeline.recipe_files import load_recipe
    from pipeline.training.engines.engine import make_engine, release
    from pipeline.training.engines.engine_config import deepspeed_config
    from pipeline.training.objectives.objective import make_objective

    recipe = load_recipe("base", [*options, f"model.name={model}"])
    plan = BatchPlan(1000, PAIRS * ranks.world_size, PAIRS, ranks.world_size)
    config = config_from_name(model)
    vision, end = config.vision, config.text.eot_token_id
    with TensorMemory() as memory:
        engine = make_engine(CLIP(config), recipe, deepspeed_config(recipe, plan, template), ranks)
        objective = make_objective(recipe.loss, ranks)
        for step in range(2):
            patches = torch.randn(PAIRS * vision.num_patches, 3 * vision.patch_size**2)
            tokens = torch.tensor([[1] * (TOKENS - 1) + [end]] * PAIRS)
            output = engine(
                patches, keep_all(PAIRS, vision.num_patches, patches.device), PackedTokens.from_padded(tokens, end)
            )
            loss = objective.pairs(*output)
            engine.backward(loss)
            engine.step()
            del patches, tokens, output, loss
            memory.mark(f"step {step}")
    release(engine)
    between, after = memory.marks[0], memory.marks[1]
    return {"states_bytes": after.live_bytes, "peak_bytes": max(between.peak_bytes, after.peak_bytes)}


def run_rank(rank: int, world_size: int, port: int, models: Sequence[str], results: Connection) -> None:
    """All arms in turn; the main rank sends what it measured."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    logging.disable()
    from pipeline.ranks import init_ranks

    ranks = init_ranks()
    for model in models:
        for arm, (template, options) in ARMS.items():
            figures = measure(model, template, options, ranks)
            if ranks.is_main:
                results.send((model, arm, figures))
    if ranks.is_main:
        results.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-tiny-16", "ViT-S-16"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    options = parser.parse_args()
    figures: dict[str, Any] = {model: {"parameters": count(model), "arms": {}} for model in options.models}
    context = multiprocessing.get_context("spawn")
    for world_size in options.ranks:
        receiver, sender = context.Pipe(duplex=False)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        processes = [
            context.Process(target=run_rank, args=(rank, world_size, port, options.models, sender), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        sender.close()
        while (received := receiver.recv()) is not None:  # EOFError: a rank failed, and said why
            model, arm, measured = received
            figures[model]["arms"].setdefault(arm, {})[f"{world_size} ranks"] = measured
            print(f"{model}, {arm}, {world_size} ranks: {measured}", flush=True)
        for process in processes:
            process.join()
    command = f"python benchmarks/engine_memory.py {shlex.join(sys.argv[1:])}".strip()
    print(f"written to {record('engine_memory', figures, command, repeats=1)}")


def count(model: str) -> int:
    """Parameters of a model."""
    from model.config import config_from_name
    from pipeline.training.weights.stage_model import count_parameters

    return count_parameters(config_from_name(model))


if __name__ == "__main__":
    main()
