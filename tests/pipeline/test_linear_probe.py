"""Logistic regression against its own definition, and probes on features whose classes are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluation.tasks.intervals import means
from pipeline.evaluation.tasks.linear_probe import Split, few_shot_rows, probe
from pipeline.evaluation.tasks.logistic import fit, minimise

pytestmark = pytest.mark.usefixtures("one_thread")


def clouds(count: int, width: int, classes: int, noise: float, seed: int = 0) -> Split:
    """Unit-length features around one direction per class."""
    generator = torch.Generator().manual_seed(seed)
    directions_CD = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels_N = torch.arange(count) % classes
    features_ND = directions_CD[labels_N] + noise * torch.randn(count, width, generator=generator)
    return Split(F.normalize(features_ND, dim=1), labels_N)


def objective(weights_DC: Tensor, biases_C: Tensor, split: Split, decay: float) -> Tensor:
    loss = F.cross_entropy(split.features_ND @ weights_DC + biases_C, split.labels_N)
    return loss + decay / 2 * weights_DC.square().sum()


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(1, 9), st.integers(0, 1000))
def test_a_solution_is_a_stationary_point(classes: int, width: int, seed: int) -> None:
    data = clouds(40, width, classes, noise=2.0, seed=seed)
    split = Split(data.features_ND.double(), data.labels_N)
    decays = [1e-4, 1e-2, 1.0]
    solution = fit(split.features_ND, split.labels_N, classes, torch.tensor(decays, dtype=torch.double))
    assert solution.converged_S.all()
    for number, decay in enumerate(decays):
        weights = solution.weights_SDC[number].clone().requires_grad_()
        biases = solution.biases_SC[number].clone().requires_grad_()
        objective(weights, biases, split, decay).backward()
        # the objective is convex: where the gradient vanishes is its minimum
        assert max(weights.grad.abs().max(), biases.grad.abs().max()) < 2e-5


def test_chunks_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    split = clouds(50, 6, 3, noise=1.0)
    decays_S = torch.tensor([1e-3, 1e-1])
    whole = fit(split.features_ND.double(), split.labels_N, 3, decays_S.double())
    monkeypatch.setattr("pipeline.evaluation.tasks.logistic._CHUNK_VALUES", 7 * 2 * 3)
    parts = fit(split.features_ND.double(), split.labels_N, 3, decays_S.double())
    torch.testing.assert_close(parts.weights_SDC, whole.weights_SDC, rtol=0, atol=1e-6)


def test_problems_of_a_batch_do_not_disturb_each_other() -> None:
    split = clouds(60, 8, 4, noise=1.5)
    features_ND = split.features_ND.double()
    together = fit(features_ND, split.labels_N, 4, torch.tensor([1e-6, 1.0]).double())
    for number, decay in enumerate((1e-6, 1.0)):
        alone = fit(features_ND, split.labels_N, 4, torch.tensor([decay]).double())
        agree = together.logits(features_ND)[number].argmax(1) == alone.logits(features_ND)[0].argmax(1)
        assert agree.all()


def test_steep_and_flat_quadratics_are_minimised_at_once() -> None:
    curvature_SP = torch.tensor([[1.0, 1e4], [1e-3, 1.0], [5.0, 5.0]]).double()
    minimum_SP = torch.tensor([[1.0, -2.0], [30.0, 4.0], [0.0, 0.0]]).double()

    asked: list[int] = []

    def quadratic(points_SP: Tensor, which_S: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(which_S))
        offsets_SP = points_SP - minimum_SP[which_S]
        return (curvature_SP[which_S] * offsets_SP.square()).sum(1) / 2, curvature_SP[which_S] * offsets_SP

    points_SP, converged_S = minimise(quadratic, torch.zeros(3, 2).double())
    assert converged_S.all()
    torch.testing.assert_close(points_SP, minimum_SP, rtol=0, atol=0.05)
    assert asked == sorted(asked, reverse=True)
    assert asked[-1] == 1  # what is solved is not computed any more


def test_a_probe_finds_the_classes_and_chooses_its_weight_decay() -> None:
    sets = [clouds(600, 16, 5, noise=1.2, seed=seed) for seed in range(3)]
    scores = probe(*sets, num_classes=5)
    metrics = means(scores.outcomes)
    assert metrics.keys() == {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall"}
    assert metrics["lp_acc1"] > 0.9
    assert metrics["lp_acc5"] == 1
    assert scores.details["training_samples"] == 1200
    assert 1e-8 <= scores.details["weight_decay"] <= 10
    # 30 samples in 64 dimensions: what a vanishing weight decay fits does not carry over so well
    few, validation, test = (clouds(count, 64, 5, noise=3.0, seed=count) for count in (30, 400, 400))
    chosen = probe(few, validation, test, 5, refit=False)
    assert chosen.details["training_samples"] == 30
    unbounded = fit(few.features_ND, few.labels_N, 5, torch.tensor([1e-8]))
    accuracy = (unbounded.logits(test.features_ND)[0].argmax(1) == test.labels_N).double().mean().item()
    assert chosen.outcomes["lp_acc1"].mean >= accuracy - 0.02


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 100))
def test_shots_are_so_many_of_each_class(shots: int, classes: int, seed: int) -> None:
    order_N = torch.randperm(6 * classes, generator=torch.Generator().manual_seed(seed))
    labels_N = torch.arange(classes).repeat_interleave(6)[order_N]
    rows_n = few_shot_rows(labels_N, shots, classes, seed)
    assert len(set(rows_n.tolist())) == shots * classes
    assert torch.bincount(labels_N[rows_n]).tolist() == [shots] * classes
    assert rows_n.equal(few_shot_rows(labels_N, shots, classes, seed))
    # two seeds may draw the same rows, once in 36 times at most; twenty in a row will not
    others = (few_shot_rows(labels_N, shots, classes, other) for other in range(seed + 1, seed + 21))
    assert any(not rows_n.equal(other_n) for other_n in others)
