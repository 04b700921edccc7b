"""From masks to the update and the report of a step: the host launches work and never asks for a result.

On a CPU the operations that would make it wait are counted; on a GPU torch itself refuses to wait.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from operations import CountOperations, without_flash_attention
from torch import Generator

from model.clip import CLIP
from model.config import Pool, config_from_name
from model.masking import STRATEGIES, MaskingConfig
from model.packing import keep_all, lengths_to_cu_seqlens
from model.towers import VisionTransformer
from model.transformer import Block
from pipeline.data.data_loader import Batch
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks, init_ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.engines.weight_average import WeightAverage
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.step_loss import make_step_loss
from pipeline.training.step_report import StepReport
from pipeline.training.train_step import Learner, train_step

# `cluster-reference` asks how many patches are kept, as the released code does
NEVER_WAIT = sorted(set(STRATEGIES) - {"cluster-reference"})


@contextmanager
def cuda_refuses_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Step(NamedTuple):
    """What a step of one rank works with."""

    learner: Learner
    batch: Batch


def run(step: Step) -> StepReport:
    """All of a training step."""
    return train_step(step.learner, [step.batch], step=1, progress=0.5)


def make(ranks: Ranks, strategy: str, pool: Pool = "class") -> Step:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    clip = CLIP(replace(config, vision=replace(config.vision, pool=pool))).to(ranks.device)
    clip.use_backend("varlen")
    recipe = load_recipe("demo", ["train.precision=bf16"])
    engine = make_engine(clip, recipe, deepspeed_config(recipe, BatchPlan(100, 6, 6, 1), "zero1_bf16"), ranks)
    mix = 0.5 if strategy == "cluster" else 0.0
    drawer = MaskDrawer(MaskingConfig(strategy, embedding_mix=mix), clip.visual, 8, seed=0, ranks=ranks)
    learner = Learner(
        engine, drawer, make_step_loss(recipe.loss, ranks), 1.0, WeightAverage(engine, 0.9, 0, ranks), ranks
    )
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=Generator().manual_seed(0))
    lengths = torch.tensor([5, 3, 8, 4, 20, 2])
    tokens = torch.arange(1, int(lengths.sum()) + 1)
    batch = Batch(pixels, tokens, lengths_to_cu_seqlens(lengths), 20, [], [])
    return Step(learner, batch.to(ranks.device))


CASES = [(strategy, "class") for strategy in NEVER_WAIT] + [("cluster", "average"), ("cluster", "attention")]


def count_on_a_cpu(ranks: Ranks) -> list[list[Any]]:
    """Of each case whether the loss is finite, whether the step was skipped, and what made the host wait."""
    logging.disable()
    found = []
    with without_flash_attention():
        for strategy, pool in CASES:
            step = make(ranks, strategy, pool)
            run(step)  # what the optimizer keeps is made in the first
            with CountOperations() as counts:
                report = run(step)
            found.append([bool(report.means_R[0].isfinite()), bool(report.skipped), dict(counts.waits)])
            step.learner.engine.release()
    return found


def test_no_operation_needs_the_host() -> None:
    assert run_ranks(count_on_a_cpu, 1) == [[[True, False, {}]] * len(CASES)]


def count_what_waits(ranks: Ranks) -> list[dict[str, int]]:
    """The buckets read lengths, and the released code's behaviour reads counts."""
    step = make(ranks, "random")
    step.learner.engine.module.use_backend("buckets")
    reference = MaskDrawer(MaskingConfig("cluster-reference"), step.learner.engine.module.visual, 8, 0, ranks)
    found = []
    for act in (lambda: run(step), lambda: reference.draw(step.batch.images_BCHW, 1, 0, 0.5)):
        with CountOperations() as counts:
            act()
        found.append(dict(counts.waits))
    return found


def test_what_waits_is_counted() -> None:
    """The check can fail."""
    (found,) = run_ranks(count_what_waits, 1)
    assert all(found)
    x = torch.ones(3)
    for wait in (lambda: torch.tensor([1.0, 2.0]), lambda: x[x > 0], lambda: x.repeat_interleave(x.long())):
        with CountOperations() as counts:
            wait()
        assert counts.waits


def count_kernels(layers: int) -> list[int]:
    """Of an image tower in bf16, forward and backward."""
    vision = replace(config_from_name("ViT-test-8").vision, layers=layers)
    tower = VisionTransformer(vision, 32).bfloat16()
    for block in tower.transformer.blocks:
        block.attn.backend = "varlen"
    patches_KP = torch.randn(4 * vision.num_patches, 3 * vision.patch_size**2, dtype=torch.bfloat16)
    selection = keep_all(4, vision.num_patches, patches_KP.device)
    with without_flash_attention():
        with CountOperations() as forward:
            features = tower(patches_KP, selection)
        loss = features.sum()
        with CountOperations() as backward:
            loss.backward()
    return [forward.kernels.total(), backward.kernels.total()]


def test_a_block_launches_as_many_kernels_as_it_says() -> None:
    more, fewer = count_kernels(4), count_kernels(3)
    said = re.search(r"(\d+) kernels forward, (\d+) backward", Block.__doc__ or "")
    assert said
    assert [a - b for a, b in zip(more, fewer, strict=True)] == [int(number) for number in said.groups()]


@pytest.fixture(scope="module")
def gpu_ranks() -> Iterator[Ranks]:
    """A world of one; DeepSpeed holds on to the first that a process makes, so all cases share it."""
    yield init_ranks()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("strategy", "pool"), CASES)
def test_a_gpu_never_makes_the_host_wait(strategy: str, pool: Pool, gpu_ranks: Ranks) -> None:
    step = make(gpu_ranks, strategy, pool)
    run(step)  # libraries load and memory is reserved the first time
    torch.cuda.synchronize()
    with cuda_refuses_to_wait():
        report = run(step)
    assert report.means_R[0].isfinite()
    step.learner.engine.release()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_vote_does_not_wait_for_the_gpu(gpu_ranks: Ranks) -> None:
    """NCCL of one rank, which believes that there is another."""
    ranks = replace(gpu_ranks, world_size=2)
    assert ranks.start_maximum([3, -4]).read() == [3, -4]
    with cuda_refuses_to_wait():
        pending = ranks.start_maximum([5, -6])
    assert pending.read() == [5, -6]
