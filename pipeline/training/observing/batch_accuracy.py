"""Retrieval within a micro-batch of one rank: how often the right partner is the nearest.

B pairs of the micro-batch, D columns of a feature, R rows of a block
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024


@torch.no_grad()
def batch_accuracy(image_features_BD: Tensor, text_features_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Share of images whose caption, and of captions whose image, is the nearest of the B; never B x B at once."""
    return _found(image_features_BD, text_features_BD), _found(text_features_BD, image_features_BD)


def _found(queries_BD: Tensor, candidates_BD: Tensor) -> Tensor:
    hits = []
    for start in range(0, len(queries_BD), _ROWS):
        scores_RB = queries_BD[start : start + _ROWS] @ candidates_BD.T
        hits.append(scores_RB.argmax(1) == torch.arange(start, start + len(scores_RB), device=scores_RB.device))
    return torch.cat(hits).float().mean()
