"""Ranks under the deepspeed launcher have the gradients of one process on the concatenated batch, concepts included."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model.clip import CLIP
from model.config import config_from_name
from model.heads import ConceptHead
from model.masking import MaskingConfig, PatchSelection
from model.packing import PackedTokens, lengths_to_cu_seqlens
from pipeline.ranks import Ranks
from pipeline.training.mask_drawer import MaskDrawer

G, L, P, T, C = 12, 16, 192, 9, 7
TAUGHT = 5  # of C concepts

# Strategies that look at pixels, at the model's patch embeddings, and through a copy of the model.
MASKING = {"cluster": {}, "mix": {"embedding_mix": 1.0}, "attentive": {"strategy": "attentive"}}


def make_batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 1000, (G, T), generator=generator)
    lengths = torch.randint(2, T + 1, (G,), generator=generator)
    tokens[torch.arange(G), lengths - 1] = 49407
    tokens = tokens * (torch.arange(T) < lengths[:, None])
    kept = torch.rand(G, L, generator=generator) < torch.rand(G, 1, generator=generator)
    kept[:, 0] = True
    images = torch.randint(0, 256, (G, 3, 32, 32), generator=generator, dtype=torch.uint8)
    patches = torch.randn(G, L, P, generator=generator)
    is_named = torch.rand(G, C, generator=generator) < 0.3
    is_named[0] = False
    counts = torch.randint(1, 100, (C,), generator=generator)
    concepts = {"is_named": is_named, "concept_counts": counts, "num_taught": TAUGHT}
    return {"patches": patches, "images": images, "tokens": tokens, "kept": kept.flatten(), **concepts}


def make_clip(pool: str) -> CLIP:
    """The worker's model, without its head."""
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    return CLIP(replace(config, vision=replace(config.vision, pool=pool)))


def concept_loss(image_BD: torch.Tensor, head: ConceptHead, batch: dict[str, Any]) -> torch.Tensor:
    """A matrix of logits, a matrix of targets."""
    target = (batch["is_named"] * ((1 + 100) / (1 + batch["concept_counts"])).log())[:, :TAUGHT]
    target = target / target.sum(1, keepdim=True).clamp(min=1e-9)
    logits = (image_BD @ head.weight.T + head.bias)[:, :TAUGHT]
    return -(target * logits.log_softmax(1)).sum() / G


def single_process_gradients(batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    clip = make_clip(batch["pool"])
    head = ConceptHead(clip.config.embed_dim, batch["concept_counts"].tolist(), 100)
    counts = batch["kept"].view(G, L).sum(1)
    selection = PatchSelection(batch["kept"].nonzero().squeeze(1), lengths_to_cu_seqlens(counts))
    output = clip(
        batch["patches"].flatten(0, 1)[selection.kept_K], selection, PackedTokens.from_padded(batch["tokens"], 49407)
    )
    logits = output.logit_scale * output.image_features @ output.text_features.T
    loss = (F.cross_entropy(logits, torch.arange(G)) + F.cross_entropy(logits.T, torch.arange(G))) / 2
    image_BD = clip.visual(batch["patches"].flatten(0, 1)[selection.kept_K], selection)
    loss = loss + 0.7 * concept_loss(image_BD, head, batch)
    loss.backward()
    clip.heads["concepts"] = head
    return loss.item(), {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


# the other stages, without the launcher: test_loss_matrix.py
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage", "pool"), [(2, 3, "attention"), (3, 1, "class")])
def test_ranks_have_the_gradients_of_the_concatenated_batch(
    ranks: int, stage: int, pool: str, tmp_path: Path, launch: Callable
) -> None:
    batch = make_batch() | {"pool": pool}
    torch.save(batch, tmp_path / "batch.pt")
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    worker = Path(__file__).with_name("gradient_worker.py")
    options = ["--template", str(template), "--masking", json.dumps(MASKING)]
    done = launch(worker, *options, str(tmp_path / "batch.pt"), str(tmp_path), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]

    loss, expected = single_process_gradients(batch)
    found = load_file(tmp_path / "gradients.safetensors")
    assert found.pop("loss").item() == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert (found[name].view_as(gradient) - gradient).abs().max() < 1e-5 * scale, name

    masks = [load_file(tmp_path / f"masks_{rank}.safetensors") for rank in range(ranks)]
    for name, kept in masks[0].items():
        # exactly the budget on every rank, each rank its own masks, and the same as without DeepSpeed
        assert {mask[name].numel() for mask in masks} == {round(0.5 * (G // ranks) * L)}
        assert not torch.equal(kept, masks[1][name])
        alone = MaskDrawer(
            MaskingConfig(**MASKING[name]), make_clip(pool).visual, 8, 0, Ranks(0, 0, 1, torch.device("cpu"))
        )
        _, expected_masks = alone.draw(batch["images"][: G // ranks], step=5, micro_batch=0, progress=0.5)
        assert torch.equal(kept, expected_masks.selection.kept_K), name
