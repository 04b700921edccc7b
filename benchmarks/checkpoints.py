"""Saving, verifying and restoring a checkpoint, against DeepSpeed's own save and load of the same engine.

    torchrun --nproc_per_node 2 benchmarks/checkpoints.py [--model ViT-S-32] [--template zero1_bf16] [--rounds 3]

Ours writes the fp32 weights whole (which evaluation reads), the moments and the generators, hashes all of it and
flushes it to the disk; `deepspeed` is its save_checkpoint followed by the same flush, without hashes and without the
weights for evaluation. Rounds alternate; figures are medians over rounds of the slowest rank. `hash` is the time that a
rank spends on sha256 of what it wrote, measured afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from record import record

from formats.files import flush_to_disk, sha256_of
from model.clip import CLIP
from model.config import config_from_name
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks, init_ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.checkpoints.checkpoint import TrainingState, checkpoint_directory
from pipeline.training.checkpoints.checkpoint_writer import CheckpointWriter
from pipeline.training.checkpoints.resume import restore, verify
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.progress import Progress


def slowest_s(act: Callable[[], Any], ranks: Ranks) -> float:
    """Time until the last rank has done it."""
    ranks.barrier()
    start_s = time.perf_counter()
    act()
    return max(ranks.gather_objects(time.perf_counter() - start_s))


def make_trained_engine(model: str, template: str, ranks: Ranks) -> tuple[Any, Any, Any]:
    """(engine after one step, so that it has moments; its recipe; its tokenizer)."""
    recipe = load_recipe("base", [f"model.name={model}", f"train.deepspeed_config={template}"])
    tokenizer = SimpleNamespace(source=b"", sha256="")  # a megabyte that is the same for both
    clip = CLIP(config_from_name(model))
    plan = BatchPlan(1024, ranks.world_size, 1, ranks.world_size)
    engine = make_engine(clip, recipe, deepspeed_config(recipe, plan, template), ranks)
    engine.backward(torch.stack([parameter.float().square().sum() for parameter in engine.module.parameters()]).sum())
    engine.update(None, torch.zeros(()))
    return engine, recipe, tokenizer


def flush_all(directory: Path, ranks: Ranks) -> None:
    """Each rank some of the files."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file())[ranks.rank :: ranks.world_size]:
        flush_to_disk(path)


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure(engine: Any, recipe: Any, tokenizer: Any, rounds: int, ranks: Ranks) -> dict[str, float]:
    """Seconds, and the sizes."""
    place = Path(ranks.from_main(lambda: tempfile.mkdtemp()))
    state = TrainingState(engine, recipe.masking)
    writer = CheckpointWriter(place / "ours", recipe, tokenizer, ranks)
    times: dict[str, list[float]] = {}

    def time_of(name: str, act: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(slowest_s(act, ranks))

    for number in range(1, rounds + 1):
        ours, theirs = checkpoint_directory(place / "ours", number), place / "deepspeed" / str(number)
        time_of("ours_save", lambda number=number: writer.save(state, Progress(number, number), must_succeed=True))
        mine = [ours / f"rank_{ranks.rank:05d}.safetensors", *([ours / "model.safetensors"] if ranks.is_main else [])]
        time_of("ours_hash", lambda mine=mine: [sha256_of(path) for path in mine])
        time_of("ours_verify", lambda ours=ours: verify(ours, ranks))
        time_of("ours_restore", lambda ours=ours: restore(state, ours, ranks))

        def save_theirs(theirs: Path = theirs) -> None:
            engine.deepspeed.save_checkpoint(str(theirs.parent), tag=theirs.name, save_latest=False)

        def flush_theirs(theirs: Path = theirs) -> None:
            flush_all(theirs, ranks)

        time_of("deepspeed_save", save_theirs)
        time_of("deepspeed_flush", flush_theirs)
        time_of(
            "deepspeed_load",
            lambda theirs=theirs: engine.deepspeed.load_checkpoint(str(theirs.parent), tag=theirs.name),
        )
        sizes = {"ours_bytes": size_bytes(ours), "deepspeed_bytes": size_bytes(theirs)}
        ranks.barrier()
        if ranks.is_main:
            shutil.rmtree(theirs)
        ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(place)
    return {f"{name}_s": statistics.median(seconds) for name, seconds in times.items()} | sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-32")
    parser.add_argument("--template", default="zero1_bf16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ranks = init_ranks()
    engine, recipe, tokenizer = make_trained_engine(options.model, options.template, ranks)
    figures = measure(engine, recipe, tokenizer, options.rounds, ranks)
    theirs_s = figures["deepspeed_save_s"] + figures["deepspeed_flush_s"]
    figures["save_over_deepspeed"] = theirs_s / figures["ours_save_s"]
    if ranks.is_main:
        part = f"{options.model}/{options.template}/{ranks.world_size} ranks"
        command = f"torchrun --nproc_per_node {ranks.world_size} benchmarks/checkpoints.py " + " ".join(sys.argv[1:])
        print(record("checkpoints", figures, command.strip(), options.rounds, part))


if __name__ == "__main__":
    main()
