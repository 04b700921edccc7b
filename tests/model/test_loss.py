"""InfoNCE against a slow double-precision loop, and split over pretended ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.loss import contrastive_loss


def slow_loss(image_BD: Tensor, text_BD: Tensor, scale: float) -> float:
    B = image_BD.shape[0]
    total = 0.0
    for i in range(B):
        to_texts = [math.exp(scale * float(image_BD[i] @ text_BD[j])) for j in range(B)]
        to_images = [math.exp(scale * float(text_BD[i] @ image_BD[j])) for j in range(B)]
        total -= math.log(to_texts[i] / sum(to_texts)) + math.log(to_images[i] / sum(to_images))
    return total / (2 * B)


def features(seed: int, B: int = 12, D: int = 7) -> Tensor:
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_slow_loop(scale: float) -> None:
    image, text = features(0), features(1)
    loss = contrastive_loss(image.float(), text.float(), torch.tensor([scale]))
    assert loss.item() == pytest.approx(slow_loss(image, text, scale), rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_mean_over_ranks_is_the_loss_of_the_whole_batch(ranks: int) -> None:
    image, text, scale = features(2).float(), features(3).float(), torch.tensor([20.0])
    whole = contrastive_loss(image, text, scale)
    b = 12 // ranks
    parts = [
        contrastive_loss(image[r * b : r * b + b], text[r * b : r * b + b], scale, image, text, first_row=r * b)
        for r in range(ranks)
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)
    assert len({round(part.item(), 6) for part in parts}) == ranks


def test_is_computed_in_float32_under_autocast() -> None:
    image, text, scale = features(4).float(), features(5).float(), torch.tensor([100.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(image, text, scale)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(image, text, 100.0), rel=1e-4)
