"""Both losses against slow loops in double precision: values, gradients, tiles, ranks pretended in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.loss import ContrastiveLoss, LossKind, TorchTiles, contrastive_loss

KINDS: tuple[LossKind, ...] = ("info_nce", "sigmoid")


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def slow_loss(kind: str, image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formulas of the papers, cell by cell; autograd gives the gradients."""
    B = len(image_BD)
    logits = [[scale[0] * (image_BD[i] * text_BD[j]).sum() for j in range(B)] for i in range(B)]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        if kind == "sigmoid":
            for j in range(B):
                total = total + softplus(-(logits[i][j] + bias[0]) if i == j else logits[i][j] + bias[0])
        else:
            row, column = torch.stack(logits[i]), torch.stack([logits[j][i] for j in range(B)])
            total = total - (row.log_softmax(0)[i] + column.log_softmax(0)[i]) / 2
    return total / B


def leaves(seed: int, B: int, D: int, scale: float, bias: float = -3.0) -> list[Tensor]:
    """Image and text features (pairs are similar), scale and bias, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, B, D, generator=generator, dtype=torch.float64)
    features = [F.normalize(image, dim=-1), F.normalize(image + 2 * noise, dim=-1)]
    numbers = [torch.tensor([value], dtype=torch.float64) for value in (scale, bias)]
    return [leaf.requires_grad_() for leaf in (*features, *numbers)]


def loss_and_gradients(loss_of: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * 3, leaves, allow_unused=True)]


def arguments(kind: str, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    return leaves if kind == "sigmoid" else leaves[:3]


@settings(deadline=None, max_examples=40)
@example(kind="sigmoid", B=1, tile=1, scale=100.0, seed=458)  # a positive whose logit is above 20
@given(
    kind=st.sampled_from(KINDS),
    B=st.integers(1, 9),
    tile=st.integers(1, 11),
    scale=st.sampled_from([0.5, 14.3, 100.0]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_equal_the_slow_loop_for_any_tiles(
    kind: LossKind, B: int, tile: int, scale: float, seed: int
) -> None:
    given = leaves(seed, B, 5, scale)
    expected = loss_and_gradients(lambda *x: slow_loss(kind, *x), given)
    found = loss_and_gradients(ContrastiveLoss(kind, tiles=TorchTiles(tile)), arguments(kind, given))
    for value, slow in zip(found, expected, strict=False):
        assert torch.allclose(value, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_single_precision_is_exact_to_its_rounding_even_under_autocast(kind: LossKind, scale: float) -> None:
    exact = leaves(1, 12, 32, scale)
    expected = loss_and_gradients(lambda *x: slow_loss(kind, *x), exact)
    rounded = [leaf.detach().float().requires_grad_() for leaf in exact]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradients(ContrastiveLoss(kind, tiles=TorchTiles(5)), arguments(kind, rounded))
    for value, slow in zip(found, expected, strict=False):
        assert value.dtype == torch.float32
        assert (value - slow).abs().max() < 2e-5 * max(1.0, float(slow.abs().max()))


def test_features_in_bf16_get_gradients_in_bf16() -> None:
    image, text, scale, _ = (leaf.detach().bfloat16().requires_grad_() for leaf in leaves(2, 6, 8, 10.0))
    loss = contrastive_loss(image, text, scale)
    loss.backward()
    assert loss.dtype == torch.float32
    assert image.grad is not None
    assert image.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_differ_by_more_than_an_exponential_can_hold(kind: LossKind) -> None:
    """Two duplicate pairs, one that fits badly and has nothing near it: its sums must not vanish beside theirs."""
    image = F.normalize(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, -1.0, 0]]), dim=-1)
    given = [image, text, torch.tensor([100.0]), torch.tensor([0.0])]
    expected = slow_loss(kind, *(x.double() for x in given))
    assert contrastive_loss_of(kind, given).item() == pytest.approx(expected.item(), rel=1e-6)


def contrastive_loss_of(kind: LossKind, given: Sequence[Tensor]) -> Tensor:
    return ContrastiveLoss(kind)(*arguments(kind, given))


@dataclass
class PretendedColumns:
    """Rank `rank` of a batch whose columns all lie here; sums of the others' visits are added up by the test."""

    all_columns: Tensor
    rows: slice
    lse: Tensor
    contributions: list[Tensor]

    def logsumexp(self, visit: Callable[[Tensor], Tensor]) -> Tensor:
        visit(self.all_columns)
        return self.lse[self.rows]

    def sum(self, visit: Callable[..., Tensor], *beside: Tensor) -> Tensor:
        self.contributions.append(visit(self.all_columns, *([self.lse] if beside else [])))
        return self.contributions[-1][self.rows].clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_mean_over_ranks_is_the_loss_of_the_whole_batch(kind: LossKind, ranks: int) -> None:
    given = [leaf.detach() for leaf in leaves(3, 12, 7, 20.0)]
    image, text, scale, bias = given
    whole = contrastive_loss_of(kind, given).item()
    lse = (scale * image @ text.T).logsumexp(1)
    b, losses = 12 // ranks, []
    for rank in range(ranks):
        rows = slice(rank * b, rank * b + b)
        columns = PretendedColumns(image, rows, lse, [])
        objective = ContrastiveLoss(kind, exchange=lambda _, columns=columns: columns)
        losses.append(objective(*arguments(kind, [image[rows], text[rows], scale, bias])).item())
    assert math.fsum(losses) / ranks == pytest.approx(whole, rel=1e-6)
    assert len({round(loss, 6) for loss in losses}) == ranks


def test_a_second_backward_pass_is_refused() -> None:
    loss = contrastive_loss(*leaves(4, 3, 4, 5.0)[:3])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


def test_the_sigmoid_loss_asks_for_its_bias() -> None:
    with pytest.raises(ValueError, match="needs a logit bias"):
        ContrastiveLoss("sigmoid")(*leaves(4, 3, 4, 5.0)[:3])
