"""Sums over a rectangle of the logits matrix, tile by tile: the rectangle is never there as a whole.

R rows, C columns, D width; r, c rows and columns of a tile; logits_RC = scale * rows_RD @ columns_CD.T (+ bias)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class SigmoidSums(NamedTuple):
    """For the sigmoid loss: sums per row of softplus(logit) and sigmoid(logit), and what goes to the columns."""

    softplus_R: Tensor
    sigmoid_R: Tensor
    at_columns_CD: Tensor


class Tiles(Protocol):
    """How a rectangle is computed. Tensors are contiguous and of one precision, fp32 or fp64; scale and bias [1].

    `into_rows_RD` is added to in place, since a row meets several rectangles.
    """

    def logsumexp(self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of the logits of each row [R], and of each column [C]."""

    def add_softmax_sums(
        self,
        rows_RD: Tensor,
        columns_CD: Tensor,
        scale: Tensor,
        row_lse_R: Tensor,
        column_lse_C: Tensor,
        into_rows_RD: Tensor,
    ) -> Tensor:
        """into_rows += w @ columns, returns w.T @ rows; w = exp(logit - row_lse) + exp(logit - column_lse)."""

    def add_sigmoid_sums(
        self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor, bias: Tensor, into_rows_RD: Tensor
    ) -> SigmoidSums:
        """into_rows += w @ columns, returns w.T @ rows and sums per row; w = sigmoid(logit)."""


@dataclass(frozen=True)
class TorchTiles:
    """Tiles of at most `size` x `size` logits with torch's operations, on any device."""

    size: int = 1024

    def logsumexp(self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See Tiles."""
        row_lse_R = rows_RD.new_full((len(rows_RD),), -torch.inf)
        column_lse_C = rows_RD.new_full((len(columns_CD),), -torch.inf)
        for r, c, logits_rc in self._logits(rows_RD, columns_CD, scale):
            row_lse_R[r] = torch.logaddexp(row_lse_R[r], logits_rc.logsumexp(1))
            column_lse_C[c] = torch.logaddexp(column_lse_C[c], logits_rc.logsumexp(0))
        return row_lse_R, column_lse_C

    def add_softmax_sums(
        self,
        rows_RD: Tensor,
        columns_CD: Tensor,
        scale: Tensor,
        row_lse_R: Tensor,
        column_lse_C: Tensor,
        into_rows_RD: Tensor,
    ) -> Tensor:
        """See Tiles."""
        at_columns_CD = torch.zeros_like(columns_CD)
        for r, c, logits_rc in self._logits(rows_RD, columns_CD, scale):
            weight_rc = (logits_rc - row_lse_R[r, None]).exp_()
            weight_rc += logits_rc.sub_(column_lse_C[c]).exp_()
            into_rows_RD[r].addmm_(weight_rc, columns_CD[c])
            at_columns_CD[c].addmm_(weight_rc.T, rows_RD[r])
        return at_columns_CD

    def add_sigmoid_sums(
        self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor, bias: Tensor, into_rows_RD: Tensor
    ) -> SigmoidSums:
        """See Tiles."""
        softplus_R, sigmoid_R = rows_RD.new_zeros(2, len(rows_RD))
        at_columns_CD = torch.zeros_like(columns_CD)
        for r, c, logits_rc in self._logits(rows_RD, columns_CD, scale):
            logits_rc += bias
            softplus_R[r] -= F.logsigmoid(-logits_rc).sum(1)  # torch's softplus is x itself from 20 on
            weight_rc = logits_rc.sigmoid_()
            sigmoid_R[r] += weight_rc.sum(1)
            into_rows_RD[r].addmm_(weight_rc, columns_CD[c])
            at_columns_CD[c].addmm_(weight_rc.T, rows_RD[r])
        return SigmoidSums(softplus_R, sigmoid_R, at_columns_CD)

    def _logits(self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Every tile with its place; what a tile holds may be overwritten, the next takes its memory."""
        memory = rows_RD.new_empty(min(self.size, len(rows_RD)) * min(self.size, len(columns_CD)))
        for row in range(0, len(rows_RD), self.size):
            r = slice(row, min(row + self.size, len(rows_RD)))
            scaled_rD = rows_RD[r] * scale
            for column in range(0, len(columns_CD), self.size):
                c = slice(column, min(column + self.size, len(columns_CD)))
                shape = (r.stop - r.start, c.stop - c.start)
                logits_rc = memory[: shape[0] * shape[1]].view(shape)
                yield r, c, torch.mm(scaled_rD, columns_CD[c].T, out=logits_rc)


Kernel = Literal["auto", "torch", "triton"]


def make_tiles(device: torch.device, size: int = 1024, kernel: Kernel = "auto") -> Tiles:
    """Fused kernels on a CUDA device where Triton is installed (a CUDA torch brings it along), else torch's tiles.

    Raises ValueError if Triton is asked for and cannot be had.
    """
    has_triton = device.type == "cuda" and find_spec("triton") is not None
    if kernel == "triton" and not has_triton:
        raise ValueError("kernel triton needs a CUDA device and the package triton")
    if kernel == "torch" or not has_triton:
        return TorchTiles(size)
    from model.kernels.triton_tiles import TritonTiles

    return TritonTiles()
