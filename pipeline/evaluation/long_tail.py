"""Long tail: accuracy on classes whose names are rare, medium or frequent words of the training captions.

N images, C classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.data.word_counts import WORD, WordFrequencies
from pipeline.evaluation.bootstrap import Outcomes

_THIRDS = ("rare", "medium", "frequent")


def class_frequencies(names: Sequence[str], words: WordFrequencies) -> Tensor:
    """Of each class the frequency of the rarest word in its name [C]; 0 if the captions have no such word."""
    of_names = [WORD.findall(name.lower()) for name in names]
    frequencies = [min((words.frequencies.get(word, 0.0) for word in found), default=0.0) for found in of_names]
    return torch.tensor(frequencies, dtype=torch.float64)


def thirds(frequency_C: Tensor) -> Tensor:
    """Which third of the classes each is in, from the rarest; int64 [C]. Equally frequent ones are in the same."""
    rarer_C = torch.searchsorted(frequency_C.sort().values, frequency_C)
    return 3 * rarer_C // len(frequency_C)


def long_tail_outcomes(hits_N: Tensor, labels_N: Tensor, third_C: Tensor) -> dict[str, Outcomes]:
    """`acc1/rare`, `/medium` and `/frequent`: the mean over a third's classes of the accuracy on each."""
    outcomes = {}
    for third, name in enumerate(_THIRDS):
        rows_N = third_C[labels_N] == third
        if rows_N.any():
            outcomes[f"acc1/{name}"] = Outcomes(hits_N[rows_N], group_N=labels_N[rows_N])
    return outcomes


def long_tail_details(frequency_C: Tensor, third_C: Tensor, words: WordFrequencies) -> dict[str, Any]:
    """How many classes each third has, between which frequencies, and of which counts."""
    ranges = {
        name: {"classes": len(part), "from": part.min().item(), "to": part.max().item()}
        for third, name in enumerate(_THIRDS)
        if len(part := frequency_C[third_C == third])
    }
    return {"word_frequency": ranges, "word_counts_sha256": words.sha256}
