"""What bf16 cannot carry is in fp32: temperature and bias, and sums of many gradients."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from forked_ranks import run_ranks
from safetensors.torch import save_file
from small_problem import G, inputs, make_batch, make_clip
from torch import Tensor

from model.clip import CLIP
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe import LossSection
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import Engine, make_engine
from pipeline.training.engines.engine_config import accumulates_in_fp32, deepspeed_config, reduces_in_fp32
from pipeline.training.step_loss import make_step_loss

TEMPLATES = ["zero1_bf16", "zero2_bf16", "zero3_bf16", "zero2_bf16_offload"]
LOG_SCALE, BIAS = 4.594321, -10.034567  # near 98.9; neither is a number of bf16


def start(ranks: Ranks, template: str, accumulation: int = 1, lr: float = 0.01) -> Engine:
    clip = make_clip()
    clip = CLIP(replace(clip.config, init_logit_scale=LOG_SCALE, init_logit_bias=BIAS))
    B = G // ranks.world_size
    plan = BatchPlan(10_000, G * accumulation, B, ranks.world_size)
    recipe = load_recipe("demo", [f"optimizer.lr={lr}"])
    return make_engine(clip, recipe, deepspeed_config(recipe, plan, template), ranks)


def accumulate(engine: Engine, ranks: Ranks, times: int) -> Tensor:
    """The gradients of all parameters, after the same micro-batch so many times."""
    B = G // ranks.world_size
    mine = slice(ranks.rank * B, (ranks.rank + 1) * B)
    loss = make_step_loss(LossSection(kind="sigmoid"), ranks)
    patches_GLP, tokens_GT = make_batch(0)
    for _ in range(times):
        engine.backward(loss.pairs(*engine(*inputs(patches_GLP[mine], tokens_GT[mine])).for_pairs))
    return torch.cat([safe_get_full_grad(parameter).flatten().float() for parameter in engine.module.parameters()])


def scalars_through_training(ranks: Ranks, directory: Path) -> dict[str, list[list[float]]]:
    """Per template (scale, bias) as computed with and as kept: at first, after each of three steps, after loading."""
    logging.disable()
    found = {}
    for template in TEMPLATES:
        engine, seen = start(ranks, template), []

        def look(engine: Engine = engine, seen: list[list[float]] = seen) -> None:
            with torch.no_grad():
                output = engine(*inputs(*(tensor[:2] for tensor in make_batch(1))))
            weights = engine.weights(ranks)
            kept = ranks.gather_objects([float(value) for name, value in weights.items() if name.startswith("logit_")])[
                0
            ]
            assert output.logit_bias is not None
            seen.append([float(output.logit_scale), float(output.logit_bias), math.exp(kept[0]), kept[1]])

        look()
        for _ in range(3):
            accumulate(engine, ranks, 1)
            engine.update(None, torch.zeros(()))
            look()
        file = directory / f"{template}.safetensors"
        weights = engine.weights(ranks)
        if ranks.is_main:
            weights["logit_scale"], weights["logit_bias"] = torch.tensor([LOG_SCALE]), torch.tensor([BIAS])
            save_file(weights, file)
        ranks.barrier()
        engine.load_weights(file)
        look()
        found[template] = seen
        engine.release()
    return found


@pytest.mark.slow
def test_temperature_and_bias_are_those_of_fp32(tmp_path: Path) -> None:
    for found in run_ranks(scalars_through_training, 2, tmp_path):
        for template, seen in found.items():
            for scale, bias, kept_scale, kept_bias in seen:
                assert scale == pytest.approx(kept_scale, rel=1e-6), template
                assert bias == kept_bias, template
            assert seen[0][:2] == seen[-1][:2] == pytest.approx([math.exp(LOG_SCALE), BIAS], rel=1e-6)
            assert len({bias for _, bias, _, _ in seen}) == 4, "each step moves it"


def relative_errors(ranks: Ranks, templates: list[str]) -> list[float]:
    """Of the mean of 32 equal gradients against one of them."""
    logging.disable()
    found = []
    for times, template in [(1, templates[0]), *((32, template) for template in templates)]:
        engine = start(ranks, template, accumulation=times)
        found.append(accumulate(engine, ranks, times))
        engine.release()
    return [float((gradient - found[0]).norm() / found[0].norm()) for gradient in found[1:]]


@pytest.mark.slow
def test_many_micro_batches_add_up(tmp_path: Path) -> None:
    rounded = tmp_path / "rounded.json"
    blocks = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
    rounded.write_text(json.dumps(blocks))
    *errors, error_of_bf16 = run_ranks(relative_errors, 2, [*TEMPLATES[:3], str(rounded)])[0]
    assert max(errors) < 3e-3
    assert error_of_bf16 > 1e-2, "else this would show nothing"


@pytest.mark.parametrize(("micro_batches", "ranks"), [(1, 1), (8, 8), (9, 8), (8, 9), (64, 64)])
def test_sums_are_wide_where_they_are_long(micro_batches: int, ranks: int) -> None:
    plan = BatchPlan(100_000, micro_batches * ranks, 1, ranks)
    config = deepspeed_config(load_recipe("base"), plan, "zero1_bf16")
    assert accumulates_in_fp32(config) == (micro_batches > 8)
    assert reduces_in_fp32(config) == (ranks > 8)
    for precision in ("fp32", "autocast", "fp16"):
        config = deepspeed_config(load_recipe("base", [f"train.precision={precision}"]), plan, "zero1_bf16")
        assert not accumulates_in_fp32(config)
        assert not reduces_in_fp32(config)
