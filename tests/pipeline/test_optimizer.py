"""Learning-rate schedule and parameter groups."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from model.clip import CLIP
from pipeline.recipe import OptimizerSection
from pipeline.training.optimizer import learning_rate, make_optimizer, parameter_groups


def test_warm_up_then_cosine() -> None:
    section = OptimizerSection(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(step, 110, section) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    between = [learning_rate(step / 7, 110, section) for step in range(9 * 7, 11 * 7)]
    assert max(between) == 1.0
    assert all(abs(a - b) < 0.02 for a, b in pairwise(between)), "no jump between steps"
    assert learning_rate(3, 3, OptimizerSection(warmup_steps=0)) == 0


def test_only_matrices_decay() -> None:
    clip = CLIP.from_name("ViT-test-8")
    decayed, others = (group["params"] for group in parameter_groups(clip, 0.2))
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed}
    other_names = {names[id(parameter)] for parameter in others}
    assert decayed_names | other_names == set(names.values())
    assert not decayed_names & other_names
    kinds = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight", "patch_embedding.weight", "proj")
    assert all(name.endswith((*kinds, "text_projection")) for name in decayed_names)
    assert {"logit_scale", "text.token_embedding.weight", "visual.positional_embedding"} <= other_names
    assert make_optimizer(clip, OptimizerSection(weight_decay=0.3)).param_groups[0]["weight_decay"] == 0.3
