"""One rank of a world that is not there: its place in the data, its memory, its collectives, on this machine's CPU.

Collectives are torch's fake ones, which do nothing: shapes, bytes and positions are those of the real rank, the values
that others would have sent are not, so losses mean nothing. No file is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from formats.errors import UserError
from model.heads import Labels
from pipeline.data.captions import Tokenizer, load_tokenizer
from pipeline.data.data_loader import Batch, MicroBatches, make_loader
from pipeline.data.sample_order import BatchPlan
from pipeline.data.training_data import TrainingData, read_training_data
from pipeline.planning.measurement import Trial, try_steps
from pipeline.planning.memory import Memory, estimate_memory
from pipeline.planning.workload import workload_of
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.training.engines.engine_config import deepspeed_config, zero_stage
from pipeline.training.stage_data import make_training_set
from pipeline.training.stage_plan import Stage, describe_stages, plan_stages
from pipeline.training.start_checks import Machine, check_stage, warnings_about

_STEPS = 2


def simulate(recipe: Recipe, rank: int, world_size: int, pairs: int | None) -> None:
    """Take two steps of each stage as `rank` of `world_size` and print what was found.

    pairs: of each micro-batch so many are computed, so that a laptop can; None: all. Raises UserError for what a run of
    that many ranks would refuse.
    """
    if not 0 <= rank < world_size:
        raise UserError(f"there is no rank {rank} among {world_size:,}: take --simulate-rank 0 to {world_size - 1:,}")
    start_s = time.perf_counter()
    ranks = Ranks(rank, 0, world_size, torch.device("cpu"))
    data = read_training_data(recipe.data)
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.context_length)
    encoder = tokenizer.encoder
    stages = plan_stages(recipe, data.epochs, world_size, encoder.vocab_size, encoder.end_token_id)
    configs = [deepspeed_config(stage.recipe, stage.batches, recipe.train.deepspeed_config) for stage in stages]
    for stage, config in zip(stages, configs, strict=True):
        data.check_batch(
            data.order(stage.recipe.data, stage.seed), stage.own_positions, stage.batches.global_batch_size
        )
        check_stage(stage, config, Machine.of(ranks.device))
    # stage 3 checks that all ranks do as rank 0 does, whose word never comes; its shares are equal on all ranks
    join_fake_world(0 if zero_stage(configs[0]) == 3 else rank, world_size)
    print(f"rank {rank:,} of {world_size:,}, simulated: collectives do nothing, losses mean nothing")
    print(describe_stages(stages, len(data.shards)))
    for warning in (warning for stage in stages for warning in warnings_about(stage)):
        print(warning)
    print(f"start: {time.perf_counter() - start_s:.1f} s", flush=True)
    for stage, config in zip(stages, configs, strict=True):
        if stage.name is not None:
            print(f"stage {stage.name}")
        _simulate_stage(stage, config, ranks, data, tokenizer, pairs)


def join_fake_world(rank: int, world_size: int) -> None:
    """A process group whose collectives return at once."""
    # what torch tests large worlds with; it has no public name
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["DS_ACCELERATOR"] = "cpu"
    launched = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in launched.items()})
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _simulate_stage(
    stage: Stage, config: dict[str, Any], ranks: Ranks, data: TrainingData, tokenizer: Tokenizer, pairs: int | None
) -> None:
    print(_describe_data(stage.batches, stage, ranks.rank))
    start_s = time.perf_counter()
    read = list(islice(_loader(stage, ranks, data, tokenizer), _STEPS * stage.batches.accumulation_steps))
    seconds = time.perf_counter() - start_s
    images = sum(len(batch.images_BCHW) for batch in read)
    print(f"  read: {images:,} pairs in {seconds:.1f} s, {_tokens(read):.1f} tokens a caption", flush=True)
    computed = [batch if pairs is None else _first(batch, pairs) for batch in read]
    accumulation = stage.batches.accumulation_steps
    steps = [computed[first : first + accumulation] for first in range(0, len(computed), accumulation)]
    trial = try_steps(stage, config, ranks, steps)
    whole = estimate_memory(workload_of(stage, config, _tokens(read), on_gpu=False), on_gpu=False)
    print(_describe_trial(trial, len(computed[0].images_BCHW), stage.batches.micro_batch_size, whole), flush=True)


def _loader(stage: Stage, ranks: Ranks, data: TrainingData, tokenizer: Tokenizer) -> Iterable[Batch]:
    """The batches of this rank from the stage's beginning, decoded here."""
    order = data.order(stage.recipe.data, stage.seed)
    dataset = make_training_set(stage, data.shards_of(stage.recipe.data), order, tokenizer)
    places = MicroBatches(stage.batches, ranks.rank, stage.first_step, stage.first_step + _STEPS)
    batches: Iterable[Batch] = make_loader(dataset, places, workers=0, pin_memory=False)
    return batches


def _first(batch: Batch, pairs: int) -> Batch:
    """The first pairs of a batch."""
    ends_B1, concepts = batch.cu_seqlens_B1[: pairs + 1], batch.concepts
    if concepts is not None:
        concept_ends_B1 = concepts.cu_labels_B1[: pairs + 1]
        concepts = Labels(concepts.class_M[: int(concept_ends_B1[-1])], concept_ends_B1)
    return Batch(
        batch.images_BCHW[:pairs].clone(),
        batch.tokens_N[: int(ends_B1[-1])],
        ends_B1,
        batch.longest_caption,
        batch.problems,
        batch.keys[:pairs],
        concepts,
        None if batch.words is None else batch.words.among_first(int(ends_B1[-1])),
    )


def _tokens(batches: list[Batch]) -> float:
    return sum(batch.tokens_N.numel() for batch in batches) / sum(len(batch.images_BCHW) for batch in batches)


def _describe_data(plan: BatchPlan, stage: Stage, rank: int) -> str:
    lines = []
    for name, step in (("first", stage.first_step), ("last", stage.end_step - 1)):
        ranges = [plan.micro_batch(step, accumulation, rank) for accumulation in range(plan.accumulation_steps)]
        epochs = sorted({stage.epochs.at(position) for r in ranges for position in (r[0], r[-1])})
        places = ", ".join(f"{r[0]:,} to {r[-1]:,}" for r in ranges)
        lines.append(f"  {name} step {step + 1:,}: samples {places} of the stream, epoch {', '.join(map(str, epochs))}")
    return "\n".join(lines)


def _describe_trial(trial: Trial, pairs: int, micro_batch_size: int, whole: Memory) -> str:
    parts = ", ".join(f"{name} {_mb(size)}" for name, size in whole.parts.items())
    collectives = [f"{name} {_mb(size)} in {trial.calls[name]:,}" for name, size in trial.payload_bytes.items()]
    return "\n".join(
        (
            f"  engine: made in {trial.setup_s:.1f} s; a step of {pairs:,} pairs took {trial.step_s:.1f} s here",
            f"  memory, measured: weights {_mb(trial.weight_bytes)}, between steps {_mb(trial.resting_bytes)}, "
            f"at most {_mb(trial.peak_bytes)} with {pairs:,} pairs",
            f"  memory, estimated for {micro_batch_size:,} pairs: {_mb(whole.tensor_bytes)} ({parts})",
            f"  collectives of a step: {', '.join(collectives)}",
        )
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
