"""A few steps of a small model on random pairs, for engines in ranks and for what they are compared with.

G pairs of the global batch, L patches of an image, P values of a patch, T padded caption length
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import CLIP, CLIPOutput
from model.config import config_from_name
from model.masking import PatchSelection
from model.packing import PackedTokens, keep_all
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe import LossSection
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import Engine, make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.start_checks import Machine, check_config
from pipeline.training.step_loss import make_step_loss

G, L, P, T = 12, 16, 192, 9


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


def reference_step(clip: CLIP, step: int, max_grad_norm: float) -> float:
    """Loss and clipped gradients of one process on the whole batch, the loss written out."""
    output = clip(*inputs(*make_batch(step)))
    logits = output.logit_scale * output.image_features @ output.text_features.T
    loss = (F.cross_entropy(logits, torch.arange(G)) + F.cross_entropy(logits.T, torch.arange(G))) / 2
    clip.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(clip.parameters(), max_grad_norm)
    return loss.item()


def start_engine(ranks: Ranks, template: str, options: Sequence[str]) -> Engine:
    """The engine for the small model; every rank has an equal part of the batch."""
    recipe = load_recipe("demo", options)
    config = deepspeed_config(recipe, BatchPlan(G, G, G // ranks.world_size, ranks.world_size), template)
    check_config(config, ranks.world_size, Machine.of(ranks.device))
    return make_engine(make_clip(), recipe, config, ranks)


def train_engine(engine: Engine, ranks: Ranks, steps: int, max_grad_norm: float = 1.0) -> Iterator[float]:
    """Train; the loss of the whole batch after each step."""
    B = G // ranks.world_size
    mine = slice(ranks.rank * B, (ranks.rank + 1) * B)
    step_loss = make_step_loss(LossSection(), ranks)
    for step in range(steps):
        patches_GLP, tokens_GT = make_batch(step)
        patches_BLP, tokens_BT = patches_GLP[mine].to(ranks.device), tokens_GT[mine].to(ranks.device)
        output: CLIPOutput = engine(*inputs(patches_BLP, tokens_BT))
        loss = step_loss.pairs(*output.for_pairs)
        engine.backward(loss)
        norm = engine.gradient_norm()
        divide_by = (norm / max_grad_norm).clamp(min=1.0) if max_grad_norm else None
        engine.update(divide_by, (~norm.isfinite()).float())
        yield ranks.mean(loss.detach().clone()).item()
