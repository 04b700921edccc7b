"""Muon for the matrices of transformer blocks, AdamW for everything else, on whole weights or on ZeRO's shares.

n matrices of a parameter, R rows, C columns; F elements of this rank's share
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Jordan et al. 2024, kellerjordan.github.io/posts/muon: a quintic that brings singular values near 1 in five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5

MatrixShape = tuple[int, int, int]


def orthogonalized(matrices_nRC: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values between 0.7 and 1.2. bf16, [n, R, C]."""
    is_tall = matrices_nRC.shape[-2] > matrices_nRC.shape[-1]
    x = matrices_nRC.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.AdamW):
    """A group with `matrices`, one shape [n, R, C] for each of its parameters, is updated by Muon, others by AdamW.

    Updates have AdamW's usual size, so that learning rate and weight decay are AdamW's (Liu et al. 2025, "Muon is
    Scalable for LLM Training", equation 4). ZeRO stages 1 and 2 give the optimizer flat shares of a group, cut
    anywhere: momentum stays with them, and of the gathered update each rank orthogonalises the matrices that its share
    touches. Skips and scales as torch's fused AdamW does: `found_inf`, `grad_scale`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights from their gradients."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        inspect.unwrap(torch.optim.AdamW.step)(self)  # without the hooks that torch calls around this step as well
        self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        weights, shapes = group["params"], group["matrices"]
        directions = [self._direction(parameter, group["momentum"]) for parameter in weights]
        if weights[0].ndim > 1:
            updates = [_update(whole, shape) for whole, shape in zip(directions, shapes, strict=True)]
        else:
            updates = [_update_of_share(share_F, shapes) for share_F in directions]
        for parameter, update in zip(weights, updates, strict=True):
            change = update.add_(parameter, alpha=group["weight_decay"])
            parameter.sub_(self._unless_skipped(change, torch.zeros_like(change)), alpha=group["lr"])

    def _direction(self, parameter: Tensor, decay: float) -> Tensor:
        """Nesterov's: the gradient, led on by the momentum that it has just joined."""
        gradient = parameter.grad
        assert gradient is not None
        scale = getattr(self, "grad_scale", None)
        gradient = gradient if scale is None else gradient / scale
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        moved = momentum.lerp(gradient, 1 - decay)
        momentum.copy_(self._unless_skipped(moved, momentum))
        return gradient.lerp(moved, decay)

    def _unless_skipped(self, new: Tensor, old: Tensor) -> Tensor:
        skip = getattr(self, "found_inf", None)
        return new if skip is None else torch.where(skip.bool(), old, new)


def _update(direction: Tensor, shape: MatrixShape) -> Tensor:
    """The update of one parameter from all of its direction, in its shape."""
    size = 0.2 * math.sqrt(max(shape[1:]))  # the root mean square of AdamW's updates
    return orthogonalized(direction.view(shape)).float().mul_(size).reshape(direction.shape)


def _update_of_share(direction_F: Tensor, shapes: Sequence[MatrixShape]) -> Tensor:
    """The same for this rank's share of parameters laid end to end, [F]; the last rank's may end in padding."""
    start, length = 0, direction_F.numel()
    whole = direction_F
    if length < sum(math.prod(shape) for shape in shapes):
        start = dist.get_rank() * length
        whole = torch.empty(dist.get_world_size() * length, dtype=torch.bfloat16, device=direction_F.device)
        dist.all_gather_into_tensor(whole, direction_F.bfloat16())
    update_F = torch.zeros_like(direction_F)
    first = 0
    for shape in shapes:
        end = first + math.prod(shape)
        mine = slice(max(first, start), min(end, start + length))
        if mine.start < mine.stop:
            update = _update(whole[first:end], shape)
            update_F[mine.start - start : mine.stop - start] = update[mine.start - first : mine.stop - first]
        first = end
    return update_F
