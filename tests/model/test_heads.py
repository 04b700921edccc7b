"""The loss over labels against torch's cross-entropy on the whole matrix; tiles, stages, rows without labels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import heads
from model.heads import ConceptHead, Labels, NamedConcepts, label_loss
from model.packing import lengths_to_cu_seqlens

B, C, D = 6, 11, 5
ROWS = [[0, 3], [], [10], [2, 4, 9], [8], [1]]


def packed(rows: list[list[int]]) -> Labels:
    lengths = torch.tensor([len(row) for row in rows])
    return Labels(torch.tensor([c for row in rows for c in row], dtype=torch.long), lengths_to_cu_seqlens(lengths))


def obvious(
    x_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, rows: list[list[int]], importance_C: Tensor, num_classes: int
) -> tuple[Tensor, float]:
    """A matrix of logits, a matrix of targets."""
    logits_BC = (x_BD @ weight_CD.T + bias_C)[:, :num_classes]
    target_BC = torch.zeros_like(logits_BC)
    hits = 0
    for row, classes in enumerate(rows):
        known = [c for c in classes if c < num_classes]
        total = sum(float(importance_C[c]) for c in known)
        for c in known:
            target_BC[row, c] = importance_C[c] / total
        hits += int(logits_BC[row].argmax()) in known
    return nn.functional.cross_entropy(logits_BC, target_BC, reduction="sum") / len(rows), hits / len(rows)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, C - 1), max_size=4, unique=True), min_size=1, max_size=7),
    num_classes=st.integers(1, C),
    tile=st.sampled_from([1, 8, 30, 10**6]),
)
def test_value_and_gradients_are_those_of_the_matrix(rows: list[list[int]], num_classes: int, tile: int) -> None:
    torch.manual_seed(len(rows) + num_classes)
    x, weight, bias = torch.randn(len(rows), D), torch.randn(C, D), torch.randn(C)
    importance = torch.rand(C) + 0.1
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    expected, hits = obvious(*inputs, rows, importance, num_classes)
    expected_gradients = torch.autograd.grad(3 * expected, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "TILE_ELEMENTS", tile)
        found = label_loss(*inputs, packed(rows), importance, num_classes)
    torch.testing.assert_close(found.loss, expected)
    assert found.hits == pytest.approx(hits)
    for gradient, wanted in zip(torch.autograd.grad(3 * found.loss, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_halves_of_a_batch_have_the_mean_of_its_gradients() -> None:
    """So ranks have: each divides by its own pairs, with labels or without."""
    torch.manual_seed(0)
    x, weight, bias, importance = torch.randn(B, D), torch.randn(C, D), torch.randn(C), torch.rand(C)
    weight.requires_grad_()

    def gradient(rows: slice) -> Tensor:
        return torch.autograd.grad(label_loss(x[rows], weight, bias, packed(ROWS[rows]), importance, 9).loss, weight)[0]

    halves = gradient(slice(0, 3)) + gradient(slice(3, 6))
    torch.testing.assert_close(halves / 2, gradient(slice(0, 6)))


def test_rare_concepts_matter_more_and_the_parameters_are_trained() -> None:
    head = ConceptHead(D, counts=[99, 9, 1], captions=99)
    assert head.importance_C.tolist() == pytest.approx([0, math.log(10), math.log(50)])  # type: ignore[union-attr,operator]
    found = head(torch.randn(2, D, dtype=torch.bfloat16), NamedConcepts(packed([[0, 1], [0]]), 3))
    found.loss.backward()
    # the second row names what every caption names: no target
    assert float(head.bias.grad.sum()) == pytest.approx(0, abs=1e-2)
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
