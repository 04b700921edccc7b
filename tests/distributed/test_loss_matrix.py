"""Losses x exchanges x ZeRO stages x precisions x accumulation x caching: ranks have the gradients of one process.

The step is the real one; a head predicts concepts beside it. What it is held against knows neither ranks nor tiles nor
DeepSpeed: features of all pairs by plain torch, the papers' formulas on the whole matrix of logits in double precision,
autograd.

B pairs of a micro-batch of a rank, T longest caption
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from forked_ranks import run_ranks
from torch import Tensor

from model.clip import CLIP
from model.config import Pool, config_from_name
from model.heads import ConceptHead, Labels
from model.masking import MaskingConfig
from model.packing import lengths_to_cu_seqlens
from pipeline.data.data_loader import Batch
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.step_loss import make_step_loss
from pipeline.training.train_step import Learner, train_step

B, T, STEP, PROGRESS = 3, 7, 5, 0.5
COUNTS, CAPTIONS, TAUGHT, WEIGHT = [90, 20, 3, 1], 100, 3, 0.5  # of concepts
# Masks of the second pass are drawn again: from pixels, through the model's embedding, through a copy of the model.
MASKS = {
    "cluster": MaskingConfig(),
    "mix": MaskingConfig(embedding_mix=1.0),
    "attentive": MaskingConfig(strategy="attentive"),
}


@dataclass(frozen=True)
class Case:
    """One engine; the losses run on it one after the other."""

    kind: str
    stage: int
    precision: str = "fp32"
    accumulation: int = 2
    masks: str = "cluster"
    pool: Pool = "class"

    @property
    def name(self) -> str:
        return f"{self.kind} stage {self.stage} {self.precision} x{self.accumulation} {self.masks} {self.pool}"


KINDS = ("info_nce", "sigmoid")
# (how columns are exchanged, whether gradients are cached)
WAYS = [(exchange, cache) for exchange in ("gather", "ring") for cache in (False, True)]
CASES_OF_2 = [
    *(Case(kind, stage, accumulation=n) for kind in KINDS for stage in range(4) for n in (1, 2)),
    *(Case(kind, stage, "bf16") for kind in KINDS for stage in (1, 2, 3)),
    *(Case(kind, stage, "autocast") for kind in KINDS for stage in range(4)),
    *(Case("info_nce", stage, masks=masks) for stage in (0, 3) for masks in ("mix", "attentive")),
    *(Case("info_nce", 2, pool=pool) for pool in ("average", "attention")),
]
CASES_OF_4 = [Case(kind, stage) for kind in KINDS for stage in (1, 3)]


def make_clip(case: Case) -> CLIP:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    config = replace(config, vision=replace(config.vision, pool=case.pool))
    config = replace(config, text=replace(config.text, vocab_size=50, eot_token_id=49))
    if case.kind == "sigmoid":
        config = replace(config, init_logit_scale=2.3, init_logit_bias=-4.0)
    clip = CLIP(config)
    clip.heads["concepts"] = ConceptHead(config.embed_dim, COUNTS, CAPTIONS)
    return clip


def make_batch(rank: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(10 * rank + number)
    lengths_B = torch.randint(2, T + 1, (B,), generator=generator)
    cu_seqlens_B1 = lengths_to_cu_seqlens(lengths_B)
    tokens_N = torch.randint(1, 49, (int(lengths_B.sum()),), generator=generator)
    tokens_N[cu_seqlens_B1[1:].long() - 1] = 49
    pixels = torch.randint(0, 256, (B, 3, 32, 32), generator=generator, dtype=torch.uint8)
    is_named_BC = torch.rand(B, len(COUNTS), generator=generator) < 0.4
    concepts = Labels(is_named_BC.nonzero()[:, 1], lengths_to_cu_seqlens(is_named_BC.sum(1)))
    return Batch(pixels, tokens_N, cu_seqlens_B1, T, [], [], concepts)


def losses_and_gradients(ranks: Ranks, case: Case) -> Iterator[tuple[bool, float, dict[str, Tensor]]]:
    """(cached, loss, gradients) of each of WAYS, by the real step on the real engine; weights stay as they are."""
    recipe = load_recipe("demo", ["optimizer.max_grad_norm=0", f"train.precision={case.precision}"])
    plan = BatchPlan(1000, B * ranks.world_size * case.accumulation, B, ranks.world_size)
    config = deepspeed_config(recipe, plan, "zero1_fp32") | {"zero_optimization": {"stage": case.stage}}
    clip = make_clip(case)
    engine = make_engine(clip, recipe, config, ranks)
    masks = MaskDrawer(MASKS[case.masks], clip.visual, 8, seed=0, ranks=ranks)
    gradients: dict[str, Tensor] = {}
    engine.set_learning_rate(0.0)
    update = engine.update

    def note_and_update(divide_by: Tensor | None, skip: Tensor) -> None:
        gradients.update({name: safe_get_full_grad(p).clone() for name, p in clip.named_parameters()})
        update(divide_by, skip)

    engine.update = note_and_update  # type: ignore[method-assign]
    batches = [make_batch(ranks.rank, number) for number in range(case.accumulation)]
    for exchange, cache in WAYS:
        options = {"kind": case.kind, "exchange": exchange, "cache_gradients": cache, "tile_size": 16}
        step_loss = make_step_loss(recipe.loss.model_copy(update=options), ranks)
        learner = Learner(engine, masks, step_loss, 0.0, average=None, ranks=ranks, concept_weight=WEIGHT)
        report = train_step(learner, batches, STEP, PROGRESS, TAUGHT)
        yield cache, ranks.mean(report.means_R[0]).item(), dict(gradients)
    engine.release()


def run_cases(ranks: Ranks, cases: list[Case]) -> dict[str, list[Any]]:
    logging.disable()
    return {case.name: list(losses_and_gradients(ranks, case)) for case in cases}


def formula(kind: str, image_GD: Tensor, text_GD: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits_GG = scale.double() * image_GD.double() @ text_GD.double().T
    target_G = torch.arange(len(logits_GG))
    if kind == "info_nce":
        return (F.cross_entropy(logits_GG, target_G) + F.cross_entropy(logits_GG.T, target_G)) / 2
    assert bias is not None
    sign_GG = 2 * torch.eye(len(logits_GG)) - 1
    return -F.logsigmoid(sign_GG * (logits_GG + bias)).sum() / len(logits_GG)


def concept_formula(image_BE: Tensor, head: ConceptHead, concepts: Labels) -> Tensor:
    target_BC = torch.zeros(B, TAUGHT, dtype=torch.double)
    for row, number in zip(concepts.row_M.tolist(), concepts.class_M.tolist(), strict=True):
        if number < TAUGHT:
            target_BC[row, number] = math.log((1 + CAPTIONS) / (1 + COUNTS[number]))
    target_BC /= target_BC.sum(1, keepdim=True).clamp(min=1e-9)
    logits_BC = (image_BE.double() @ head.weight.double().T + head.bias.double())[:, :TAUGHT]
    return -(target_BC * logits_BC.log_softmax(1)).sum() / B


@functools.cache
def single_process(case: Case, world_size: int, cached: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all ranks' micro-batches; negatives are all pairs if cached, else those at once."""
    clip = make_clip(case)
    if case.precision == "bf16":
        clip.bfloat16()
    drawers = [
        MaskDrawer(MASKS[case.masks], clip.visual, 8, 0, Ranks(rank, rank, world_size, torch.device("cpu")))
        for rank in range(world_size)
    ]
    autocast = torch.autocast("cpu", torch.bfloat16) if case.precision == "autocast" else nullcontext()
    outputs, concept_losses = [], []
    for number in range(case.accumulation):
        for rank, drawer in enumerate(drawers):
            batch = make_batch(rank, number)
            images, chosen = drawer.draw(batch.images_BCHW, STEP, number, PROGRESS)
            patches_KP = images.gather(chosen.selection.kept_K)
            with autocast:
                outputs.append(clip(patches_KP, chosen.selection, batch.text))
                image_BE = clip.visual(patches_KP, chosen.selection)
            concept_losses.append(concept_formula(image_BE, clip.heads["concepts"], batch.concepts))
    at_once = len(outputs) if cached else world_size
    groups = [outputs[first : first + at_once] for first in range(0, len(outputs), at_once)]
    losses = []
    for group in groups:
        images_GD, texts_GD = (torch.cat([output[side] for output in group]) for side in (0, 1))
        losses.append(formula(case.kind, images_GD, texts_GD, group[0].logit_scale, group[0].logit_bias))
    loss = torch.stack(losses).mean()
    (loss + WEIGHT * torch.stack(concept_losses).mean()).backward()
    return loss.item(), {name: p.grad.float() for name, p in clip.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> float:
    found_N, expected_N = (torch.cat([values[name].flatten() for name in names]) for values in (found, expected))
    return float((found_N - expected_N).norm() / expected_N.norm())


def check(case: Case, world_size: int, found: list[Any]) -> None:
    tolerance = 2e-5 if case.precision == "fp32" else 5e-2
    assert len(found) == len(WAYS)
    # one process has no stages: the same reference serves all
    expected = {cached: single_process(replace(case, stage=0), world_size, cached) for cached in (False, True)}
    for cached, loss, gradients in found:
        expected_loss, expected_gradients = expected[cached]
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert gradients.keys() == expected_gradients.keys()
        numbers = [name for name in gradients if name.startswith("logit_")]
        assert len(numbers) == (2 if case.kind == "sigmoid" else 1)
        heads = [name for name in gradients if name.startswith("heads.")]
        assert len(heads) == 2
        for names in ([*gradients], heads, *([name] for name in numbers)):
            assert relative_error(gradients, expected_gradients, names) < tolerance, names


@pytest.fixture(scope="module")
def found_by_2() -> dict[str, list[Any]]:
    return run_ranks(run_cases, 2, CASES_OF_2)[0]


@pytest.fixture(scope="module")
def found_by_4() -> dict[str, list[Any]]:
    return run_ranks(run_cases, 4, CASES_OF_4)[0]


@pytest.mark.parametrize("case", CASES_OF_2, ids=lambda case: case.name)
def test_two_ranks_have_the_gradients_of_one_process(case: Case, found_by_2: dict[str, list[Any]]) -> None:
    check(case, 2, found_by_2[case.name])


@pytest.mark.parametrize("case", CASES_OF_4, ids=lambda case: case.name)
def test_four_ranks_have_the_gradients_of_one_process(case: Case, found_by_4: dict[str, list[Any]]) -> None:
    check(case, 4, found_by_4[case.name])


def test_caching_brings_in_negatives_of_other_micro_batches() -> None:
    """Else the cases above could not tell a cached loss from one without."""
    (plain, _), (cached, _) = (single_process(Case("info_nce", 0), 2, cached) for cached in (False, True))
    assert cached - plain > 0.3
