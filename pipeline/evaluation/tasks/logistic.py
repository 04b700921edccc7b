"""Multinomial logistic regression for many weight decays at once: one batched L-BFGS, each problem with its own steps.

S weight decays, N samples, D columns of a feature, C classes, M steps remembered, P = (D + 1) * C values of a solution
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MEMORY = 10
_MAX_STEPS = 500
# A problem is solved where no value of its gradient is larger: of a mean over samples, so independent of N.
_TOLERANCE = 1e-5
_SUFFICIENT_DECREASE, _MAX_HALVINGS = 1e-4, 25
# Logits of so many values are held at once.
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Solution:
    """Weights [S, D, C] and biases [S, C] of the classifiers; which problems converged, [S]."""

    weights_SDC: Tensor
    biases_SC: Tensor
    converged_S: Tensor

    def of(self, problem: int) -> Solution:
        """One of them alone, S = 1."""
        return Solution(*(part[problem : problem + 1] for part in (self.weights_SDC, self.biases_SC, self.converged_S)))

    def logits(self, features_ND: Tensor) -> Tensor:
        """[S, N, C]."""
        return torch.einsum("nd,sdc->snc", features_ND, self.weights_SDC) + self.biases_SC[:, None]


def fit(
    features_ND: Tensor, labels_N: Tensor, num_classes: int, decays_S: Tensor, start: Solution | None = None
) -> Solution:
    """Minimise, for each weight decay s, mean cross-entropy + s / 2 * |weights|^2; biases are not decayed.

    start: one that is near all of them, which saves steps and changes nothing else
    With s = 1 / (C * N) the objective of scikit-learn's LogisticRegression(C), up to a factor.
    """
    S, D = len(decays_S), features_ND.shape[1]
    if start is None:
        start_SP = features_ND.new_zeros(S, (D + 1) * num_classes)
    else:
        start_SP = torch.cat((start.weights_SDC.flatten(1), start.biases_SC), 1).expand(S, -1)

    def objective(points_SP: Tensor, which_S: Tensor) -> tuple[Tensor, Tensor]:
        return _objective(points_SP, features_ND, labels_N, num_classes, decays_S.to(features_ND)[which_S])

    points_SP, converged_S = minimise(objective, start_SP)
    weights_SDC, biases_SC = _unpack(points_SP, D, num_classes)
    return Solution(weights_SDC, biases_SC, converged_S)


def _unpack(points_SP: Tensor, D: int, C: int) -> tuple[Tensor, Tensor]:
    weights_SDC = points_SP[:, : D * C].view(-1, D, C)
    return weights_SDC, points_SP[:, D * C :]


def _objective(
    points_SP: Tensor, features_ND: Tensor, labels_N: Tensor, num_classes: int, decays_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Values [S] and gradients [S, P], in closed form, over chunks of samples."""
    N, D = features_ND.shape
    weights_SDC, biases_SC = _unpack(points_SP, D, num_classes)
    values_S = decays_S / 2 * weights_SDC.square().sum((1, 2))
    grad_weights_SDC = decays_S[:, None, None] * weights_SDC
    grad_biases_SC = torch.zeros_like(biases_SC)
    for rows in _chunks(N, len(points_SP) * num_classes):
        part_nD, labels_n = features_ND[rows], labels_N[rows]
        logits_SnC = torch.einsum("nd,sdc->snc", part_nD, weights_SDC) + biases_SC[:, None]
        log_p_SnC = logits_SnC.log_softmax(-1)
        index_Sn1 = labels_n.expand(len(points_SP), -1)[..., None]
        values_S = values_S - log_p_SnC.gather(2, index_Sn1).sum((1, 2)) / N
        error_SnC = log_p_SnC.exp_()
        error_SnC.scatter_add_(2, index_Sn1, torch.full_like(index_Sn1, -1, dtype=error_SnC.dtype))
        grad_weights_SDC = grad_weights_SDC + torch.einsum("nd,snc->sdc", part_nD, error_SnC) / N
        grad_biases_SC = grad_biases_SC + error_SnC.sum(1) / N
    return values_S, torch.cat((grad_weights_SDC.flatten(1), grad_biases_SC), 1)


def _chunks(total: int, values_per_row: int) -> Iterator[slice]:
    size = max(1, _CHUNK_VALUES // values_per_row)
    for first in range(0, total, size):
        yield slice(first, first + size)


def minimise(objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], start_SP: Tensor) -> tuple[Tensor, Tensor]:
    """Independent smooth convex problems, by L-BFGS (Nocedal and Wright, algorithm 7.4) with backtracking.

    objective: points [S, P] and which problems they are of, [S] -> values [S], gradients [S, P]
    Returns the points and which of them converged. What has is left where it is, and costs nothing from then on.
    """
    solved_SP, converged_S = start_SP.clone(), torch.zeros(len(start_SP), dtype=torch.bool, device=start_SP.device)
    points_SP, which_S = start_SP, torch.arange(len(start_SP), device=start_SP.device)
    values_S, gradients_SP = objective(points_SP, which_S)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    stuck_S = torch.zeros_like(converged_S)
    for number in range(_MAX_STEPS + 1):
        is_solved_S = (gradients_SP.abs().amax(1) <= _TOLERANCE) | stuck_S
        solved_SP[which_S], converged_S[which_S] = points_SP, is_solved_S
        if is_solved_S.all() or number == _MAX_STEPS:
            break
        if is_solved_S.any():
            left = ~is_solved_S
            points_SP, values_S, gradients_SP = points_SP[left], values_S[left], gradients_SP[left]
            history = [(steps[left], changes[left], curvature[left]) for steps, changes, curvature in history]
            which_S = which_S[left]
        directions_SP = -_two_loops(gradients_SP, history)
        slopes_S = (directions_SP * gradients_SP).sum(1)
        step_S = torch.ones_like(values_S) if history else 1 / gradients_SP.abs().sum(1).clamp_min(1e-12)
        for _ in range(_MAX_HALVINGS):
            trial_SP = points_SP + step_S[:, None] * directions_SP
            trial_values_S, trial_gradients_SP = objective(trial_SP, which_S)
            too_long_S = trial_values_S > values_S + _SUFFICIENT_DECREASE * step_S * slopes_S
            if not too_long_S.any():
                break
            step_S = torch.where(too_long_S, step_S / 2, step_S)
        stuck_S = too_long_S  # rounding forbids a further decrease
        moved_S1 = ~too_long_S[:, None]
        steps_SP = torch.where(moved_S1, trial_SP - points_SP, 0.0)
        changes_SP = torch.where(moved_S1, trial_gradients_SP - gradients_SP, 0.0)
        history = [*history[-_MEMORY + 1 :], (steps_SP, changes_SP, (steps_SP * changes_SP).sum(1))]
        points_SP = points_SP + steps_SP
        gradients_SP = gradients_SP + changes_SP
        values_S = torch.where(moved_S1[:, 0], trial_values_S, values_S)
    return solved_SP, converged_S


def _two_loops(gradients_SP: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian's estimate times the gradients; a pair without curvature is passed over."""
    result_SP = gradients_SP
    factors = []
    for steps_SP, changes_SP, curvature_S in reversed(history):
        inverse_S = torch.where(curvature_S > 0, 1 / curvature_S, 0.0)
        factor_S = inverse_S * (steps_SP * result_SP).sum(1)
        factors.append((factor_S, inverse_S))
        result_SP = result_SP - factor_S[:, None] * changes_SP
    if history:
        _, changes_SP, curvature_S = history[-1]
        scale_S = torch.where(curvature_S > 0, curvature_S / changes_SP.square().sum(1).clamp_min(1e-30), 1.0)
        result_SP = scale_S[:, None] * result_SP
    for (steps_SP, changes_SP, _), (factor_S, inverse_S) in zip(history, reversed(factors), strict=True):
        other_S = inverse_S * (changes_SP * result_SP).sum(1)
        result_SP = result_SP + (factor_S - other_S)[:, None] * steps_SP
    return result_SP
