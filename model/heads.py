"""Heads: layers that training has beside the two towers, and exports have not. This one predicts words of captions.

B pictures, M labels of all of them, D width, C classes; c classes of a tile
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.loss import PairLoss, attach_gradients

# Logits that are held at a time, 64 MiB in fp32: of 1,024 rows and 16,384 classes.
TILE_ELEMENTS = 1 << 24


class Labels(NamedTuple):
    """Classes of each row, any number, each once: class_M, row after row; cu_labels_B1 their int32 prefix sums."""

    class_M: Tensor
    cu_labels_B1: Tensor

    @property
    def lengths_B(self) -> Tensor:
        """Labels of each row."""
        return self.cu_labels_B1.diff()

    @property
    def row_M(self) -> Tensor:
        """The row of each label."""
        rows_B = torch.arange(self.cu_labels_B1.numel() - 1, device=self.class_M.device)
        return rows_B.repeat_interleave(self.lengths_B, output_size=self.class_M.numel())


class LabelLoss(NamedTuple):
    """Cross-entropy, to be differentiated, and the share of rows whose likeliest class is their own; scalars."""

    loss: Tensor
    hits: Tensor


@dataclass(frozen=True)
class _Logits:
    """x @ weight.T + bias, the first `num_classes` columns, tile after tile."""

    x_BD: Tensor
    weight_CD: Tensor
    bias_C: Tensor
    num_classes: int

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The classes of a tile and its logits [B, c], fp32, which may be overwritten."""
        size = max(1, TILE_ELEMENTS // len(self.x_BD))
        for first in range(0, self.num_classes, size):
            c = slice(first, min(first + size, self.num_classes))
            yield c, (self.x_BD @ self.weight_CD[c].T).float().add_(self.bias_C[c])


def label_loss(
    x_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, labels: Labels, importance_C: Tensor, num_classes: int
) -> LabelLoss:
    """Softmax cross-entropy of x @ weight.T + bias with the labels of each row, the mean over all rows.

    A row's target is the `importance_C` of its labels, made to sum to 1; a row without labels costs nothing. Classes
    from `num_classes` on take no part. Source: "Classification Done Right for Vision-Language Pre-Training" (Huang et
    al. 2024, SuperClass), whose importance is the inverse frequency of a word.

    Gradients are computed here and now, in tiles: neither the logits nor the weights are needed again.
    """
    with torch.no_grad(), torch.autocast(x_BD.device.type, enabled=False):
        logits = _Logits(x_BD, weight_CD.to(x_BD.dtype), bias_C.float(), num_classes)
        found = _evaluate(logits, labels, _shares(labels, importance_C.float(), num_classes))
    padded = (found.gradients[0], *(_padded(gradient, len(bias_C)) for gradient in found.gradients[1:]))
    return LabelLoss(attach_gradients(PairLoss(found.loss, padded), x_BD, weight_CD, bias_C), found.hits)


def _shares(labels: Labels, importance_C: Tensor, num_classes: int) -> Tensor:
    """What each label is of its row's target [M]: 0 where it takes no part."""
    if not labels.class_M.numel():
        return importance_C.new_zeros(0)
    importance_M = importance_C[labels.class_M] * (labels.class_M < num_classes)
    # a segment sum: the same bits each time; unsafe: the lengths are not checked, which would make the host wait
    total_B = torch.segment_reduce(importance_M, "sum", lengths=labels.lengths_B, unsafe=True)
    total_M = total_B[labels.row_M]
    return torch.where(total_M > 0, importance_M / total_M, 0.0)


class _Found(NamedTuple):
    loss: Tensor
    hits: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]


def _evaluate(logits: _Logits, labels: Labels, share_M: Tensor) -> _Found:
    x_BD, B = logits.x_BD, len(logits.x_BD)
    row_M, class_M = labels.row_M, labels.class_M
    lse_B = share_M.new_full((B,), -torch.inf)
    best_B, best_class_B = lse_B.clone(), torch.zeros(B, dtype=torch.long, device=x_BD.device)
    positives = share_M.new_zeros(())
    tiles: Sequence[tuple[slice, Tensor]] = []
    for c, logits_Bc in logits.tiles():
        tiles = [(c, logits_Bc)]
        lse_B = torch.logaddexp(lse_B, logits_Bc.logsumexp(1))
        value_B, index_B = logits_Bc.max(1)
        best_class_B = torch.where(value_B > best_B, index_B + c.start, best_class_B)
        best_B = torch.maximum(best_B, value_B)
        inside_M, index_M = _within(class_M, c)
        positives = positives + (share_M * inside_M * logits_Bc[row_M, index_M]).sum()
    has_target_B = share_M.new_zeros(B).index_add_(0, row_M, (share_M > 0).float()).clamp_(max=1)
    hit_M = (best_class_B[row_M] == class_M) & (share_M > 0)
    hits = share_M.new_zeros(B).index_add_(0, row_M, hit_M.float()).mean()
    loss = ((has_target_B * lse_B).sum() - positives) / B

    at_x_BD = torch.zeros_like(x_BD, dtype=torch.float32)
    at_weight_CD = torch.zeros_like(logits.weight_CD[: logits.num_classes], dtype=torch.float32)
    at_bias_C = share_M.new_zeros(logits.num_classes)
    only_one = len(tiles) == 1 and tiles[0][0].start == 0  # the logits are still there
    for c, logits_Bc in tiles if only_one else logits.tiles():
        error_Bc = logits_Bc.sub_(lse_B[:, None]).exp_().mul_(has_target_B[:, None])
        inside_M, index_M = _within(class_M, c)
        # accumulated in one order, unlike index_add's: indices outside of the tile come more than once
        error_Bc.index_put_((row_M, index_M), -share_M * inside_M, accumulate=True)
        error_Bc.div_(B)
        at_bias_C[c] = error_Bc.sum(0)
        error_Bc = error_Bc.to(x_BD.dtype)
        at_x_BD += error_Bc @ logits.weight_CD[c]
        at_weight_CD[c] = (error_Bc.T @ x_BD).float()
    return _Found(loss, hits, (at_x_BD, at_weight_CD, at_bias_C))


def _within(class_M: Tensor, c: slice) -> tuple[Tensor, Tensor]:
    """Which labels are of a tile's classes, and their columns there; some column for the others."""
    column_M = class_M - c.start
    return (column_M >= 0) & (class_M < c.stop), column_M.clamp(0, c.stop - c.start - 1)


def _padded(gradient: Tensor, num_classes: int) -> Tensor:
    """With zeros for the classes that took no part."""
    if len(gradient) == num_classes:
        return gradient
    whole = gradient.new_zeros(num_classes, *gradient.shape[1:])
    whole[: len(gradient)] = gradient
    return whole


class NamedConcepts(NamedTuple):
    """The concepts that the captions of a batch name, and how many there are up to the curriculum's stage."""

    labels: Labels
    num_classes: int


class ConceptHead(nn.Module):
    """Which concepts does the caption name? One linear layer asks the feature of a picture's visible patches.

    counts: captions that hold each concept, of `captions` in all
    """

    def __init__(self, width: int, counts: Sequence[int], captions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(counts), width))
        self.bias = nn.Parameter(torch.zeros(len(counts)))
        importance_C = [math.log((1 + captions) / (1 + count)) for count in counts]
        self.register_buffer("importance_C", torch.tensor(importance_C), persistent=False)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, features_BD: Tensor, named: NamedConcepts) -> LabelLoss:
        """Loss and hits of a batch."""
        importance_C = cast(Tensor, self.importance_C)
        return label_loss(features_BD, self.weight, self.bias, named.labels, importance_C, named.num_classes)
