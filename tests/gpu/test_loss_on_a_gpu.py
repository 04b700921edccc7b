"""On a GPU the fused kernels and torch's tiles are one function: that of the whole matrix in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.loss import ContrastiveLoss, LossKind, TorchTiles, make_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def whole_matrix(kind: LossKind, *leaves: torch.Tensor) -> torch.Tensor:
    image, text, scale, bias = leaves
    logits, target = scale * text @ image.T, torch.arange(len(image), device=image.device)
    if kind == "info_nce":
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    sign = 2 * torch.eye(len(image), device=image.device) - 1
    return -F.logsigmoid(sign * (logits + bias)).sum() / len(image)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize(("B", "D"), [(1000, 512), (300, 72), (4096, 768), (5, 32)])
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_values_and_gradients(kind: LossKind, B: int, D: int, kernel: str) -> None:
    generator = torch.Generator("cuda").manual_seed(B)
    image, noise = torch.randn(2, B, D, generator=generator, device="cuda", dtype=torch.float64)
    features = F.normalize(image, dim=-1), F.normalize(image + 3 * noise, dim=-1)
    numbers = (torch.tensor([value], device="cuda", dtype=torch.float64) for value in (30.0, -8.0))
    exact = [leaf.requires_grad_() for leaf in (*features, *numbers)]
    expected = whole_matrix(kind, *exact)
    expected_gradients = torch.autograd.grad(expected, exact, allow_unused=True)

    leaves = [leaf.detach().float().requires_grad_() for leaf in exact][: 4 if kind == "sigmoid" else 3]
    tiles = make_tiles(torch.device("cuda")) if kernel == "triton" else TorchTiles(256)
    assert isinstance(tiles, TorchTiles) == (kernel == "torch")
    losses = [ContrastiveLoss(kind, tiles=tiles)(*leaves) for _ in range(2)]
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5)
    for first, second, exact_gradient in zip(*gradients, expected_gradients, strict=False):
        assert torch.equal(first, second)  # a resumed run repeats its bits
        assert float((first.double() - exact_gradient).norm() / exact_gradient.norm()) < 1e-4
