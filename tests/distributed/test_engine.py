"""Every template and precision trains in two ranks as one process with plain torch does on the concatenated batch.

G pairs of the global batch, L patches of an image, P values of a patch, T padded caption length
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import run_ranks
from torch import Tensor

from model.clip import CLIP, CLIPOutput
from model.config import config_from_name
from model.masking import PatchSelection
from model.masking.selection import keep_all
from model.packing import PackedTokens
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engine import make_engine, release
from pipeline.training.engine_config import check_config, deepspeed_config
from pipeline.training.objective import make_objective

G, L, P, T, STEPS = 8, 16, 192, 9, 3


@dataclass(frozen=True)
class Case:
    """A template with options, and how far its losses may be from fp32's."""

    template: str
    tolerance: float
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.template, *self.options))


FP32, AUTOCAST = ("train.precision=fp32",), ("train.precision=autocast",)
CASES = [
    Case("zero0_fp32", 2e-5),
    Case("zero0_fp32", 2e-2, AUTOCAST),
    Case("zero1_bf16", 3e-2),
    Case("zero1_bf16", 2e-2, AUTOCAST),
    Case("zero1_fp32", 2e-5),
    Case("zero2_bf16", 3e-2),
    Case("zero2_bf16", 2e-2, AUTOCAST),
    Case("zero2_bf16", 2e-5, FP32),
    Case("zero2_bf16_offload", 3e-2),
    Case("zero2_bf16_offload", 2e-5, FP32),
    Case("zero3_bf16", 3e-2),
    Case("zero3_bf16", 2e-2, AUTOCAST),
    Case("zero3_bf16", 2e-5, FP32),
    Case("zero3_bf16_offload", 3e-2),
    Case("zero3_bf16_offload", 2e-5, FP32),
]


def make_clip() -> CLIP:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    return CLIP(replace(config, text=replace(config.text, vocab_size=50, eot_token_id=49)))


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """Patches [G, L, P] and captions [G, T] of different lengths."""
    generator = torch.Generator().manual_seed(step)
    tokens_GT = torch.randint(1, 49, (G, T), generator=generator)
    lengths_G = torch.randint(2, T + 1, (G,), generator=generator)
    tokens_GT[torch.arange(G), lengths_G - 1] = 49
    return torch.randn(G, L, P, generator=generator), tokens_GT * (torch.arange(T) < lengths_G[:, None])


def inputs(patches_GLP: Tensor, tokens_GT: Tensor) -> tuple[Tensor, PatchSelection, PackedTokens]:
    selection = keep_all(*patches_GLP.shape[:2], patches_GLP.device)
    return patches_GLP.flatten(0, 1), selection, PackedTokens.from_padded(tokens_GT, 49)


OPTIONS = ["optimizer.lr=1e-3", "optimizer.weight_decay=0.2", "optimizer.max_grad_norm=1"]


def reference_losses() -> list[float]:
    """One process, fp32, torch's own AdamW and clipping."""
    clip, losses = make_clip(), []
    matrices = [
        p for name, p in clip.named_parameters() if p.ndim > 1 and "embedding" not in name.replace("patch_", "")
    ]
    others = [p for p in clip.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    for step in range(STEPS):
        output = clip(*inputs(*make_batch(step)))
        logits = output.logit_scale * output.image_features @ output.text_features.T
        loss = (F.cross_entropy(logits, torch.arange(G)) + F.cross_entropy(logits.T, torch.arange(G))) / 2
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
    return losses


def train(ranks: Ranks, case: Case) -> list[float]:
    recipe = load_recipe("demo", [*OPTIONS, *case.options])
    B = G // ranks.world_size
    config = deepspeed_config(recipe, BatchPlan(G, G, B, ranks.world_size), case.template)
    check_config(config, ranks)
    engine, losses = make_engine(make_clip(), recipe, config, ranks), []
    for step in range(STEPS):
        mine = slice(ranks.rank * B, (ranks.rank + 1) * B)
        patches_GLP, tokens_GT = make_batch(step)
        output: CLIPOutput = engine(*inputs(patches_GLP[mine], tokens_GT[mine]))
        loss = make_objective(recipe.loss, ranks).pairs(*output)
        engine.backward(loss)
        engine.step()
        losses.append(ranks.mean(loss.detach().clone()).item())
    release(engine)
    return losses


def train_all(ranks: Ranks) -> dict[str, Any]:
    logging.disable()
    return {case.name: train(ranks, case) for case in CASES}


@pytest.fixture(scope="module")
def losses() -> dict[str, Any]:
    return run_ranks(train_all, 2)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_train_as_one_process(case: Case, losses: dict[str, Any]) -> None:
    expected = reference_losses()
    assert expected[0] - expected[1] > 10 * case.tolerance  # else a wrong update would not show
    assert losses[case.name] == pytest.approx(expected, abs=case.tolerance)
