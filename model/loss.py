"""Contrastive losses on features of unit length, exact in value and gradient without the matrix of logits.

B pairs of this process, C column features of any number of processes, D width; R rows of a rectangle of logits;
r, c rows and columns of a tile of it; logits_RC = scale * rows_RD @ columns_CD.T (+ bias)

A loss is a sum over cells of the logits of rows (captions) and columns (images), less its positives, the diagonal.
Gradients are computed along with it, so that nothing but themselves is kept for the backward pass. Where several
processes share a batch, each has rows of its own and meets the columns of all through an `Exchange`; the mean over
processes of their losses is the loss of the whole batch, and so it is with the gradients of parameters. Sums over a
rectangle of the logits are made tile by tile: it is never there as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """into_rows += w @ columns, w = sigmoid(logit).

        Returns sums per row of softplus(logit) [R] and of sigmoid(logit) [R], and w.T @ rows [C, D].
        """


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
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        return softplus_R, sigmoid_R, at_columns_CD

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


LossKind = Literal["info_nce", "sigmoid"]


class Columns(Protocol):
    """The columns of all processes as this one meets them: at once, or block after block.

    What `visit` returns for each of a block's columns is put together over all processes' visits; every process gets
    what belongs to its own columns.
    """

    def logsumexp(self, visit: Callable[[Tensor], Tensor]) -> Tensor:
        """visit(columns_CD) -> [C]; put together as a log-sum-exp, [B]."""

    def sum(self, visit: Callable[..., Tensor], *beside_B: Tensor) -> Tensor:
        """visit(columns_CD, *beside_C) -> [C, D]; put together as a sum, [B, D]. `beside_B` goes where columns go."""


Exchange = Callable[[Tensor], Columns]


@dataclass(frozen=True)
class OwnColumns:
    """The exchange of a single process: its own columns are all there are."""

    columns_BD: Tensor

    def logsumexp(self, visit: Callable[[Tensor], Tensor]) -> Tensor:
        """See Columns."""
        return visit(self.columns_BD)

    def sum(self, visit: Callable[..., Tensor], *beside_B: Tensor) -> Tensor:
        """See Columns."""
        return visit(self.columns_BD, *beside_B)


class PairLoss(NamedTuple):
    """A loss, and its gradients by image features, text features, logit scale and, for `sigmoid`, logit bias."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class ContrastiveLoss:
    """A loss of image and text features: which one, how columns are exchanged, how tiles are computed."""

    kind: LossKind = "info_nce"
    exchange: Exchange = OwnColumns
    tiles: Tiles = field(default_factory=TorchTiles)

    def __call__(
        self, image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """The loss as a scalar that can be differentiated; collective where columns are exchanged."""
        pair_loss = self.evaluate(image_BD, text_BD, logit_scale, logit_bias)
        return attach_gradients(pair_loss, image_BD, text_BD, logit_scale, logit_bias)

    @torch.no_grad()
    def evaluate(
        self, image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> PairLoss:
        """Loss and gradients; in fp32 whatever the autocast, in fp64 for features in fp64."""
        precision = torch.promote_types(image_BD.dtype, torch.float32)
        image_BD, text_BD, scale = (x.to(precision).contiguous() for x in (image_BD, text_BD, logit_scale))
        with torch.autocast(image_BD.device.type, enabled=False):
            if self.kind == "info_nce":
                return _info_nce(image_BD, text_BD, scale, self.exchange(image_BD), self.tiles)
            if logit_bias is None:
                raise ValueError("the sigmoid loss needs a logit bias")
            return _sigmoid(image_BD, text_BD, scale, logit_bias.to(precision), self.exchange(image_BD), self.tiles)


def _info_nce(image_BD: Tensor, text_BD: Tensor, scale: Tensor, images: Columns, tiles: Tiles) -> PairLoss:
    """Symmetric cross-entropy over rows and over columns (Radford et al. 2021, figure 3)."""
    B = len(text_BD)
    row_lse_B = text_BD.new_full((B,), -torch.inf)

    def visit_lse(columns_CD: Tensor) -> Tensor:
        row_part_B, column_lse_C = tiles.logsumexp(text_BD, columns_CD, scale)
        torch.logaddexp(row_lse_B, row_part_B, out=row_lse_B)
        return column_lse_C

    column_lse_B = images.logsumexp(visit_lse)
    positive_B = scale * _dot(image_BD, text_BD)
    loss = (row_lse_B + column_lse_B - 2 * positive_B).mean() / 2

    at_text_BD = torch.zeros_like(text_BD)

    def visit_weights(columns_CD: Tensor, column_lse_C: Tensor) -> Tensor:
        return tiles.add_softmax_sums(text_BD, columns_CD, scale, row_lse_B, column_lse_C, at_text_BD)

    at_image_BD = images.sum(visit_weights, column_lse_B)
    # each positive has a share in the cross-entropy of its row and in that of its column
    at_text_BD.sub_(image_BD, alpha=2)
    at_image_BD.sub_(text_BD, alpha=2)
    scale_gradient = _dot(text_BD, at_text_BD).sum(0, keepdim=True) / (2 * B)
    factor = scale / (2 * B)
    return PairLoss(loss, (at_image_BD.mul_(factor), at_text_BD.mul_(factor), scale_gradient))


def _sigmoid(image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, images: Columns, tiles: Tiles) -> PairLoss:
    """Every cell a decision of its own (Zhai et al. 2023, SigLIP), summed over columns and averaged over rows.

    A negative costs softplus(logit), a positive softplus(-logit) = softplus(logit) - logit.
    """
    B = len(text_BD)
    softplus_B, sigmoid_B = text_BD.new_zeros(2, B)
    at_text_BD = torch.zeros_like(text_BD)

    def visit(columns_CD: Tensor) -> Tensor:
        softplus_R, sigmoid_R, at_columns_CD = tiles.add_sigmoid_sums(text_BD, columns_CD, scale, bias, at_text_BD)
        softplus_B.add_(softplus_R)
        sigmoid_B.add_(sigmoid_R)
        return at_columns_CD

    at_image_BD = images.sum(visit).sub_(text_BD)
    at_text_BD.sub_(image_BD)
    positive_B = scale * _dot(image_BD, text_BD) + bias
    loss = (softplus_B - positive_B).mean()
    scale_gradient = _dot(text_BD, at_text_BD).sum(0, keepdim=True) / B
    bias_gradient = (sigmoid_B - 1).mean().view(1)
    factor = scale / B
    return PairLoss(loss, (at_image_BD.mul_(factor), at_text_BD.mul_(factor), scale_gradient, bias_gradient))


def _dot(left_BD: Tensor, right_BD: Tensor) -> Tensor:
    """Scalar products of rows, [B]; unlike vecdot without their products in memory."""
    return torch.einsum("bd,bd->b", left_BD, right_BD)


class _KnownGradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, pair_loss: PairLoss, *inputs: Tensor) -> Tensor:
        ctx.gradients = pair_loss.gradients
        return pair_loss.loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a loss are scaled in place: it has no second backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(gradient.mul_(grads[0]) for gradient in gradients)


def attach_gradients(pair_loss: PairLoss, *inputs: Tensor | None) -> Tensor:
    """The loss as a function of `inputs` (None left out), each with its gradient; for one backward pass."""
    loss: Tensor = _KnownGradients.apply(pair_loss, *(x for x in inputs if x is not None))
    return loss


# InfoNCE of a single process.
contrastive_loss = ContrastiveLoss()
