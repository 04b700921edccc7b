"""Differentiable gather of features over ranks.

B rows of this rank, G = B * world size rows of all, D width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """all-gather forward, reduce-scatter (sum) backward.

    The sum over ranks is what makes the mean of the ranks' losses have the gradient of the concatenated batch:
    DeepSpeed then divides by the number of ranks, and no other factor is needed.
    """

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        rows_GD = rows_BD.new_empty(rows_BD.shape[0] * dist.get_world_size(), rows_BD.shape[1])
        dist.all_gather_into_tensor(rows_GD, rows_BD.contiguous())
        return rows_GD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (grad_GD,) = grads
        grad_BD: Tensor = grad_GD.new_empty(grad_GD.shape[0] // dist.get_world_size(), grad_GD.shape[1])
        dist.reduce_scatter_tensor(grad_BD, grad_GD.contiguous())
        return grad_BD


def gather_features(features_BD: Tensor) -> Tensor:
    """Features of all ranks in rank order, [B, D] -> [G, D], with gradients to every rank's own; B equal on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features_BD
    gathered: Tensor = _GatherRows.apply(features_BD)
    return gathered
