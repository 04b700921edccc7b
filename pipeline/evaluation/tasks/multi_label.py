"""Multi-label classification: mean average precision, as CLIP_benchmark reports it for VOC2007.

N images, C classes, B resamples at once
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.sets.layouts import MultiLabelSet
from pipeline.evaluation.tasks.intervals import percentile_intervals
from pipeline.evaluation.tasks.task import Scores


def multi_label_scores(dataset: MultiLabelSet, scores_NC: Tensor, template_sha256: str) -> Scores:
    """`mean_average_precision` from the similarity of every image and class."""
    positive_NC = torch.zeros(scores_NC.shape, dtype=torch.bool)
    for positive_C, sample in zip(positive_NC, dataset.samples, strict=True):
        positive_C[list(sample.labels)] = True
    name = "mean_average_precision"
    return Scores(
        metrics={name: mean_average_precision(scores_NC, positive_NC)},
        chance={name: mean_average_precision(torch.zeros_like(scores_NC), positive_NC)},
        samples=len(dataset.samples),
        template_sha256=template_sha256,
        intervals={name: interval_of_mean_average_precision(scores_NC, positive_NC)},
    )


def mean_average_precision(scores_NC: Tensor, positive_NC: Tensor) -> float:
    """Mean over the classes that occur of `average_precision`; positive_NC is bool."""
    occurs_C = positive_NC.any(0)
    return average_precision(scores_NC[:, occurs_C], positive_NC[:, occurs_C]).mean().item()


def average_precision(scores_NC: Tensor, positive_NC: Tensor) -> Tensor:
    """Mean precision at the rank of each positive, [C], float64; in expectation over all orders of tied images."""
    return torch.stack(
        [
            _average_precision(scores_N, positive_N)
            for scores_N, positive_N in zip(scores_NC.T, positive_NC.T, strict=True)
        ]
    )


def _average_precision(scores_N: Tensor, positive_N: Tensor) -> Tensor:
    order_N = scores_N.argsort(descending=True)
    hits_N = positive_N[order_N].double()
    _, tie_N, size_T = torch.unique_consecutive(scores_N[order_N], return_inverse=True, return_counts=True)
    # of the ties, in descending order: positives in each, and images and positives above it
    positives_T = torch.zeros(len(size_T), dtype=torch.float64).index_add_(0, tie_N, hits_N)
    above_N = (size_T.cumsum(0) - size_T)[tie_N]
    positives_above_N = (positives_T.cumsum(0) - positives_T)[tie_N]
    rank_N = torch.arange(1, len(hits_N) + 1)
    # a place in a tie holds a positive with this probability, and then so many others are expected before it there
    share_N = positives_T[tie_N] / size_T[tie_N]
    before_N = (rank_N - above_N - 1) * (positives_T[tie_N] - 1) / (size_T[tie_N] - 1).clamp_min(1)
    precision_N: Tensor = share_N * (positives_above_N + before_N + 1) / rank_N
    return precision_N.sum() / hits_N.sum()


def interval_of_mean_average_precision(scores_NC: Tensor, positive_NC: Tensor) -> list[float]:
    """The 95 % interval over images. Images that are drawn several times, or tie, have the precision after the last."""
    order_NC = scores_NC.argsort(dim=0, descending=True, stable=True)
    hits_NC = positive_NC.gather(0, order_NC).double()

    def estimate(weights_BN: Tensor) -> Tensor:
        columns = []
        for order_N, hits_N in zip(order_NC.T, hits_NC.T, strict=True):
            drawn_BN = weights_BN[:, order_N]
            found_BN = drawn_BN * hits_N
            precision_BN = found_BN.cumsum(1) / drawn_BN.cumsum(1).clamp_min(1)
            columns.append((found_BN * precision_BN).sum(1) / found_BN.sum(1))  # NaN where no positive is drawn
        return torch.stack(columns, 1).nanmean(1, keepdim=True)

    return percentile_intervals(len(scores_NC), estimate)[0]
