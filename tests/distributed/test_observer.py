"""What logged steps tell, against plain torch in one process: norms per tower, accuracy within the batch, phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import run_ranks
from torch import Generator, Tensor

from model.clip import CLIP
from model.config import config_from_name
from model.masking import MaskingConfig
from model.packing import PatchedImages, keep_all, lengths_to_cu_seqlens
from pipeline.data.data_loader import Batch
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.engines.optimizer import make_optimizer
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.observing.step_observer import PHASES, StepObserver, batch_accuracy
from pipeline.training.step_loss import make_step_loss
from pipeline.training.train_step import Learner, train_step

G = 8
OPTIONS = ["optimizer.lr=0.01", "optimizer.max_grad_norm=0.05", "optimizer.weight_decay=0.3", "optimizer.eps=1e-4"]
MASKING = MaskingConfig("none")


def make_clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(config_from_name("ViT-test-8"))


def make_batch(part: slice) -> Batch:
    generator = Generator().manual_seed(1)
    images = torch.randint(0, 256, (G, 3, 32, 32), dtype=torch.uint8, generator=generator)[part]
    tokens_GT = torch.randint(1, 200, (G, 5), generator=generator)[part]
    lengths = torch.full((len(images),), 5)
    return Batch(images, tokens_GT.flatten(), lengths_to_cu_seqlens(lengths), 5, [], [""] * len(images))


def observe(ranks: Ranks, stages: list[int], directory: str) -> list[list[dict[str, Any]]]:
    """Per ZeRO stage what is read after a watched step, a step that is not watched, and a watched one."""
    found = []
    for stage in stages:
        path = Path(directory) / f"{stage}_{ranks.rank}_{ranks.world_size}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        B = G // ranks.world_size
        recipe = load_recipe("demo", OPTIONS)
        config = deepspeed_config(recipe, BatchPlan(1000, G, B, ranks.world_size), str(path))
        clip = make_clip()
        engine = make_engine(clip, recipe, config, ranks)
        masks = MaskDrawer(MASKING, clip.visual, 8, 0, ranks)
        step_loss = make_step_loss(recipe.loss, ranks)
        learner = Learner(engine, masks, step_loss, recipe.optimizer.max_grad_norm, average=None, ranks=ranks)
        read = []
        for step in range(3):
            observer = StepObserver(ranks) if step != 1 else None
            batches = [make_batch(slice(B * ranks.rank, B * (ranks.rank + 1)))]
            norm = float(train_step(learner, batches, step, 0.5, observer=observer).grad_norm)
            read.append({"grad_norm": norm, **(observer.read(norm) if observer else {})})
        found.append(read)
        engine.release()
    return found


def expected() -> list[dict[str, float]]:
    """The same three steps by torch alone."""
    clip = make_clip()
    section = load_recipe("demo", OPTIONS).optimizer
    optimizer = make_optimizer(clip, section)
    batch = make_batch(slice(0, G))
    steps = []
    for _ in range(3):
        optimizer.zero_grad()
        images = PatchedImages(batch.images_BCHW, 8)
        output = clip(images.patches().flatten(0, 1), keep_all(G, 16, images.device), batch.text)
        logits = output.logit_scale * output.image_features @ output.text_features.T
        loss = (F.cross_entropy(logits, torch.arange(G)) + F.cross_entropy(logits.T, torch.arange(G))) / 2
        loss.backward()
        norms: dict[str, float] = {}
        towers = {"image": "visual.", "text": "text.", "temperature": "logit"}
        for tower, prefix in towers.items():
            mine = [(name, value) for name, value in clip.named_parameters() if name.startswith(prefix)]
            norms[f"grad_norm_{tower}"] = torch.cat([value.grad.flatten() for _, value in mine]).norm().item()
            norms[f"weight_norm_{tower}"] = torch.cat([value.detach().flatten() for _, value in mine]).norm().item()
        before = {name: value.detach().clone() for name, value in clip.named_parameters()}
        norms["grad_norm"] = torch.nn.utils.clip_grad_norm_(clip.parameters(), section.max_grad_norm).item()
        assert norms["grad_norm"] > 2 * section.max_grad_norm  # else clipping would not show
        optimizer.step()
        for tower, prefix in towers.items():
            mine = [(name, value) for name, value in clip.named_parameters() if name.startswith(prefix)]
            changes = [(value.detach() - before[name]).flatten() for name, value in mine]
            norms[f"update_norm_{tower}"] = torch.cat(changes).norm().item()
        steps.append(norms)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_norms_are_those_of_plain_torch(world_size: int, tmp_path: Path) -> None:
    stages = [0, 1, 2, 3]
    reference = expected()
    for rank_found in run_ranks(observe, world_size, stages, str(tmp_path)):
        for stage, read in zip(stages, rank_found, strict=True):
            assert read[1]["grad_norm"] == pytest.approx(reference[1]["grad_norm"], rel=2e-3)
            for step in (0, 2):
                for name, value in reference[step].items():
                    assert read[step][name] == pytest.approx(value, rel=2e-3), (stage, step, name)
                shares = [read[step][f"{phase}_share"] for phase in PHASES]
                assert sum(shares) == pytest.approx(1)
                assert min(shares) >= 0
                assert max(shares[2], shares[4]) > 0
                assert 0 <= read[step]["batch_image_accuracy"] <= 1


def test_accuracy_within_a_batch_is_that_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.observing.step_observer._ACCURACY_ROWS", 7)
    generator = Generator().manual_seed(3)
    text_BD: Tensor = F.normalize(torch.randn(40, 6, generator=generator), dim=1)
    image_BD = F.normalize(text_BD + 0.4 * torch.randn(40, 6, generator=generator), dim=1)
    scores_BB = image_BD @ text_BD.T
    image, text = batch_accuracy(image_BD, text_BD)
    assert image == (scores_BB.argmax(1) == torch.arange(40)).float().mean()
    assert text == (scores_BB.argmax(0) == torch.arange(40)).float().mean()
    assert 0.1 < image < 1
