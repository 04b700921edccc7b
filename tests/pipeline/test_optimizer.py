"""Learning-rate schedule and parameter groups."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from formats.errors import UserError
from model.clip import CLIP
from model.config import Pool, config_from_name
from pipeline.recipe import OptimizerSection
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import asking_first
from pipeline.training.engines.muon import MuonAdamW, orthogonalized
from pipeline.training.engines.optimizer import (
    freeze_towers,
    make_optimizer,
    parameter_groups,
)
from pipeline.training.engines.template import TEMPLATES_DIRECTORY
from pipeline.training.stage_plan import learning_rate
from pipeline.training.start_checks import check_optimizer


def test_warm_up_then_cosine() -> None:
    section = OptimizerSection(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(step, 111, section) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    between = [learning_rate(step / 7, 111, section) for step in range(9 * 7, 11 * 7)]
    assert max(between) == 1.0
    assert all(abs(a - b) < 0.02 for a, b in pairwise(between)), "no jump between steps"
    assert learning_rate(2, 3, OptimizerSection(warmup_steps=0)) == 0
    assert learning_rate(0, 1, OptimizerSection(warmup_steps=0, lr=0.5)) == 0.5


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_the_last_step_has_the_rate_of_the_end(end: float) -> None:
    for steps in (4, 10, 1000):
        section = OptimizerSection(lr=0.3, warmup_steps=2, final_lr_ratio=end)
        assert learning_rate(steps - 1, steps, section) == pytest.approx(0.3 * end)
        assert learning_rate(steps - 2, steps, section) > 0.3 * end


def grouped_names(clip: CLIP, section: OptimizerSection) -> list[tuple[dict[str, Any], set[str]]]:
    """Every group with the names of its parameters, each of which is in one group or frozen."""
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    groups = [(group, {names[id(p)] for p in group["params"]}) for group in parameter_groups(clip, section)]
    trained = [name for _, members in groups for name in members]
    assert sorted(trained) == sorted(name for name, p in clip.named_parameters() if p.requires_grad)
    return groups


def test_only_matrices_decay() -> None:
    clip = CLIP.from_name("ViT-test-8")
    groups = grouped_names(clip, OptimizerSection(weight_decay=0.3))
    assert [group["weight_decay"] for group, _ in groups] == [0.0, 0.3]
    (_, others), (_, decayed) = groups
    kinds = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight", "patch_embedding.weight", "proj")
    assert all(name.endswith((*kinds, "text_projection")) for name in decayed)
    assert {"logit_scale", "text.token_embedding.weight", "visual.positional_embedding"} <= others
    assert not any("." in name and name.endswith(kinds) for name in others)


def open_clip_exempts(name: str, parameter: torch.Tensor) -> bool:
    """Its training's rule, as it is written there."""
    return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name


@pytest.mark.parametrize(
    ("model", "pool"), [("ViT-test-8", "class"), ("ViT-B-32", "class"), ("ViT-test-8", "attention")]
)
def test_decay_of_embeddings_is_open_clips(model: str, pool: Pool) -> None:
    config = config_from_name(model)
    with torch.device("meta"):
        clip = CLIP(replace(config, vision=replace(config.vision, pool=pool)))
    named = dict(clip.named_parameters())
    for group, names in grouped_names(clip, OptimizerSection(decay_embeddings=True)):
        for name in names:
            assert (group["weight_decay"] == 0) == open_clip_exempts(name, named[name]), name


@pytest.mark.parametrize(
    "recipe", ["cc12m_vit_b16_pgs", "datacomp_medium_vit_b16_cluster", "laion400m_vit_b16_cluster"]
)
def test_recipes_that_have_open_clips_decay(recipe: str) -> None:
    assert load_recipe(recipe).optimizer.decay_embeddings
    assert not load_recipe("base").optimizer.decay_embeddings  # as runs that were begun before this option


def test_muon_has_the_matrices_of_blocks_alone() -> None:
    clip = CLIP.from_name("ViT-test-8")
    groups = grouped_names(clip, OptimizerSection(name="muon"))
    (matrices,) = [(group, names) for group, names in groups if group["matrices"]]
    assert len(matrices[1]) == 4 * 4  # of two blocks in each tower
    assert all(".resblocks." in name for name in matrices[1])
    assert matrices[0]["matrices"][:2] == [(3, 32, 32), (1, 32, 32)]
    assert isinstance(make_optimizer(clip, OptimizerSection(name="muon")), MuonAdamW)


def test_a_frozen_tower_is_in_no_group() -> None:
    clip = CLIP.from_name("ViT-test-8")
    section = OptimizerSection(image_lr_ratio=0)
    freeze_towers(clip, section)
    names = set().union(*(names for _, names in grouped_names(clip, section)))
    assert "logit_scale" in names
    assert {name.partition(".")[0] for name in names} == {"logit_scale", "text"}
    freeze_towers(clip, OptimizerSection())
    assert all(parameter.requires_grad for parameter in clip.parameters())


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 16, 40), (2, 48, 12)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalized(matrices.float()).double() @ right.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    large = values > 0.1 * values.amax(-1, keepdim=True)
    assert ((diagonal > 0.6) & (diagonal < 1.3))[large].all()
    assert (found - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_a_skipped_step_changes_nothing_and_a_scale_is_taken_out() -> None:
    results = []
    for scale, skips in [(1.0, [False]), (8.0, [False]), (1.0, [True, False, True])]:
        clip = CLIP.from_name("ViT-test-8")
        torch.manual_seed(0)
        for parameter in clip.parameters():
            torch.nn.init.normal_(parameter)
        optimizer = make_optimizer(clip, OptimizerSection(name="muon", lr=0.1))
        optimizer.grad_scale = torch.tensor(scale)
        for skip in skips:
            for number, parameter in enumerate(clip.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.grad = torch.full_like(noise, torch.nan) if skip else noise * scale
            optimizer.found_inf = torch.tensor(float(skip))
            optimizer.step()
        results.append([*clip.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values() if len(s) == 1)])
    assert len(results[0]) > len(list(clip.parameters()))
    for once, *others in zip(*results, strict=True):
        assert all(torch.allclose(once, other, rtol=1e-6, atol=1e-7) for other in others)


@pytest.mark.parametrize(
    ("template", "message"),
    [("zero3_bf16", "does not work with ZeRO stage 3"), ("zero2_bf16_offload", "does not work on the CPU")],
)
def test_where_muon_cannot_see_whole_matrices_it_is_refused(template: str, message: str) -> None:
    config = json.loads((TEMPLATES_DIRECTORY / f"{template}.json").read_text())
    check_optimizer(OptimizerSection(), config)
    with pytest.raises(UserError, match=message):
        check_optimizer(OptimizerSection(name="muon"), config)


class Plain(torch.optim.Optimizer):
    """Knows nothing of scales and skips, as DeepSpeed's."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= parameter.grad


def test_an_optimizer_that_does_not_know_of_skips_is_taught_to_ask() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = asking_first(Plain)([weight], {})
    for found_inf, grad_scale, expected in [(1.0, None, [1.0, 2.0]), (0.0, 4.0, [0.5, 1.5]), (0.0, None, [-1.5, -0.5])]:
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
        optimizer.step()
        assert weight.tolist() == expected
