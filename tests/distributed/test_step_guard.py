"""A step that is not finite on one rank changes nothing on any, whatever the ZeRO stage and precision."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from forked_ranks import run_ranks
from torch import Generator, Tensor

from model.clip import CLIP
from model.config import config_from_name
from model.masking import MaskingConfig
from model.packing import lengths_to_cu_seqlens
from pipeline.data.data_loader import Batch
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.engines.fragments import full_weights
from pipeline.training.faults.agreement import RankCheck
from pipeline.training.faults.guard import FaultLog, StepGuard, StepOutcome
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.step_loss import make_step_loss
from pipeline.training.train_step import Learner, spread_non_finite, train_step

BF16 = {"bf16": {"enabled": True}}
ENGINES: dict[str, dict[str, Any]] = {
    **{f"zero{stage} fp32": {"zero_optimization": {"stage": stage}} for stage in range(4)},
    **{f"zero{stage} bf16": {"zero_optimization": {"stage": stage}, **BF16} for stage in (1, 2, 3)},
    "zero2 autocast": {"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "zero1 bf16 muon": {"zero_optimization": {"stage": 1}, **BF16},
    # an optimizer of DeepSpeed's of its own
    "zero1 bf16 sums in fp32": {
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        **BF16,
    },
}
Fault = Literal["feature", "gradient"] | None
B = 4  # pairs of a micro-batch


def make_batch(seed: int) -> Batch:
    generator = Generator().manual_seed(seed)
    images = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8, generator=generator)
    lengths = torch.tensor([5, 3, 8, 4])
    tokens = torch.randint(1, 200, (int(lengths.sum()),), generator=generator)
    return Batch(images, tokens, lengths_to_cu_seqlens(lengths), 8, [], [f"{seed}/{n}" for n in range(B)])


class Faults:
    """On the last rank, when asked to: the second image has no number for a feature, or gradients are infinite."""

    def __init__(self, clip: CLIP, ranks: Ranks) -> None:
        self.now: Fault = None
        self._on_this_rank = ranks.rank == ranks.world_size - 1
        clip.visual.register_forward_hook(self._spoil)

    def _spoil(self, module: torch.nn.Module, inputs: Any, features_BD: Tensor) -> Tensor:
        if self._on_this_rank and self.now == "feature":
            return features_BD + torch.tensor([0.0, float("nan"), 0.0, 0.0]).to(features_BD)[:, None]
        if self._on_this_rank and self.now == "gradient" and features_BD.requires_grad:
            features_BD.register_hook(lambda gradient_BD: gradient_BD * float("inf"))
        return features_BD


Step = tuple[int, Fault]  # seed of its data and masks


def run_steps(
    ranks: Ranks, recipe: Recipe, config: dict[str, Any], steps: list[Step]
) -> tuple[dict[str, Tensor], list[StepOutcome]]:
    """Weights after these steps of two micro-batches each, and their outcomes."""
    torch.manual_seed(0)
    clip = CLIP(config_from_name("ViT-test-8"))
    engine = make_engine(clip, recipe, config, ranks)
    masks = MaskDrawer(MaskingConfig("random"), clip.visual, 8, seed=0, ranks=ranks)
    section = recipe.optimizer
    learner = Learner(
        engine, masks, make_step_loss(recipe.loss, ranks), section.max_grad_norm, average=None, ranks=ranks
    )
    rank_check = RankCheck(clip, 1, ranks)
    guard = StepGuard(recipe.faults, rank_check, FaultLog(Path(), ranks), is_fp16=False, ranks=ranks)
    faults = Faults(clip, ranks)
    for number, (seed, faults.now) in enumerate(steps, start=1):
        batches = [make_batch(100 * seed + 10 * ranks.rank + n) for n in range(2)]
        guard.note(number, train_step(learner, batches, seed, 0.5), batches)
    outcomes = guard.read()
    weights = full_weights(engine.deepspeed, ranks)
    # and what this rank computes with: with ZeRO stage 3 nothing between passes
    weights |= {f"module.{name}": value.detach().clone() for name, value in engine.module.named_parameters()}
    engine.release()
    return weights, outcomes


def compare(ranks: Ranks, engines: Sequence[str], directory: str) -> dict[str, list[StepOutcome]]:
    """Each engine with faulty steps in between and without; raises where they made a difference."""
    found = {}
    for name in engines:
        path = Path(directory) / f"{name} {ranks.rank}.json"
        path.write_text(json.dumps(ENGINES[name]))
        plan = BatchPlan(1000, 2 * B * ranks.world_size, B, ranks.world_size)
        kind = "muon" if "muon" in name else "adamw"
        options = ["optimizer.lr=0.01", f"optimizer.name={kind}", f"loss.cache_gradients={'bf16' in name}"]
        recipe = load_recipe("demo", options)
        config = deepspeed_config(recipe, plan, str(path))
        without, _ = run_steps(ranks, recipe, config, [(1, None), (3, None)])
        steps: list[Step] = [(0, "gradient"), (1, None), (2, "feature"), (3, None)]
        weights, found[name] = run_steps(ranks, recipe, config, steps)
        for parameter, expected in without.items():
            assert torch.equal(weights[parameter], expected), f"{name}: {parameter} is not what it was"
            assert expected.isfinite().all()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "engines"), [(1, ["zero0 fp32", "zero1 bf16"]), (2, list(ENGINES))])
def test_faulty_steps_leave_no_trace(world_size: int, engines: list[str], tmp_path: Path) -> None:
    """Bit for bit: weights, and optimiser state in what follows from it."""
    for rank, found in enumerate(run_ranks(compare, world_size, engines, str(tmp_path))):
        for name, outcomes in found.items():
            assert [outcome.skipped for outcome in outcomes] == [True, False, True, False], name
            assert [math.isfinite(outcome.loss) for outcome in outcomes] == [True, True, False, True], name
            is_faulty = rank == world_size - 1
            # the second sample of each micro-batch of that rank, and nobody else's
            named = [f"{200 + 10 * rank + n}/1" for n in range(2)] if is_faulty else []
            assert list(outcomes[2].suspects) == named, name
            assert not outcomes[2].features_finite
            everything = [f"{10 * rank + n}/{b}" for n in range(2) for b in range(B)]
            assert list(outcomes[0].suspects) == everything, name
            assert outcomes[0].features_finite


def test_an_infinite_loss_with_finite_gradients_is_not_applied() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(spread_non_finite(x.sum()), x)
    assert gradient.tolist() == [1.0, 1.0]
    (gradient,) = torch.autograd.grad(spread_non_finite(x.sum() + float("inf")), x)
    assert gradient.isnan().all()
