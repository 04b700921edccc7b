"""Whether a query finds a positive among its first k candidates, when candidates may tie.

Exact ties are common in real sets (two pictures with the same caption, two classes with the same name) and the rule of
a sort is an accident. Here tied candidates count as if they were in random order, in expectation and without a
draw: figures do not depend on the order of the data, and a model that gives all candidates the same score gets exactly
the score of chance.

N queries
"""

from __future__ import annotations

import torch
from torch import Tensor


def hit_probability(better_N: Tensor, tied_N: Tensor, tied_positives_N: Tensor, k: int) -> Tensor:
    """Probability that a positive is among the first k, fp64 [N].

    `better_N` counts the candidates above the best positive, `tied_N` those with its score (itself included) and
    `tied_positives_N` the positives among the latter. Without ties this is 1 where better < k, else 0.
    """
    slots_N = k - better_N
    miss_N = torch.ones_like(better_N, dtype=torch.float64)
    for slot in range(k):
        negatives_left_N = (tied_N - tied_positives_N - slot).clamp_min(0)
        slot_misses_N = negatives_left_N.double() / (tied_N - slot).clamp_min(1)
        miss_N = torch.where(slot < slots_N, miss_N * slot_misses_N, miss_N)
    return 1 - miss_N


def chance_of_hit(num_candidates: int, positives_N: Tensor, k: int) -> float:
    """Mean hit probability of a model to which all candidates are the same; positives_N int64 [N]."""
    better_N = torch.zeros_like(positives_N)
    return hit_probability(better_N, torch.full_like(positives_N, num_candidates), positives_N, k).mean().item()
