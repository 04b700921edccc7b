"""Contrastive losses on features of unit length, exact in value and gradient without the matrix of logits.

B pairs of this process, C column features of any number of processes, D width

A loss is a sum over cells of the logits of rows (captions) and columns (images), less its positives, the diagonal.
Gradients are computed along with it, so that nothing but themselves is kept for the backward pass. Where several
processes share a batch, each has rows of its own and meets the columns of all through an `Exchange`; the mean over
processes of their losses is the loss of the whole batch, and so it is with the gradients of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from model.loss_tiles import Tiles, TorchTiles

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
        sums = tiles.add_sigmoid_sums(text_BD, columns_CD, scale, bias, at_text_BD)
        softplus_B.add_(sums.softplus_R)
        sigmoid_B.add_(sums.sigmoid_R)
        return sums.at_columns_CD

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
