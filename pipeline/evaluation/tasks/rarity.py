"""Accuracy by how rare a class is in the training data: as a word of its captions, and as a cluster of its pictures.

N images, C classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.word_counts import WORD, WordFrequencies
from pipeline.evaluation.tasks.intervals import Outcomes

# How the names of its metrics begin.
BY_RARITY = "acc1/"


@dataclass(frozen=True)
class Rarity:
    """One measure of how frequent each class is.

    name: as a result's details call it
    thirds: what a third of the classes is called, from the rarest
    frequency_C: float64; 0 of a class that the training captions do not name
    """

    name: str
    thirds: tuple[str, str, str]
    frequency_C: Tensor

    @property
    def third_C(self) -> Tensor:
        """Which third each class is in, int64. Equally frequent ones are in the same."""
        rarer_C = torch.searchsorted(self.frequency_C.sort().values, self.frequency_C)
        return 3 * rarer_C // len(self.frequency_C)


def rarity_of_classes(names: Sequence[str], words: WordFrequencies) -> list[Rarity]:
    """By the rarest word of each name: its frequency, and where it is known the size of the clusters it occurs in."""
    rarest = [
        min(WORD.findall(name.lower()), key=lambda w: words.frequencies.get(w, 0.0), default="") for name in names
    ]

    def values(of_words: dict[str, float]) -> Tensor:
        return torch.tensor([of_words.get(word, 0.0) for word in rarest], dtype=torch.float64)

    by_word = Rarity("word_frequency", ("rare", "medium", "frequent"), values(words.frequencies))
    if not words.cluster_sizes:
        return [by_word]
    thirds = ("tail_clusters", "middle_clusters", "head_clusters")
    return [by_word, Rarity("cluster_size", thirds, values(words.cluster_sizes))]


def accuracy_by_rarity(hits_N: Tensor, labels_N: Tensor, rarities: Sequence[Rarity]) -> dict[str, Outcomes]:
    """`acc1/THIRD` of each measure: the mean over a third's classes of the accuracy on each."""
    outcomes = {}
    for rarity in rarities:
        for third, name in enumerate(rarity.thirds):
            rows_N = rarity.third_C[labels_N] == third
            if rows_N.any():
                outcomes[f"{BY_RARITY}{name}"] = Outcomes(hits_N[rows_N], group_N=labels_N[rows_N])
    return outcomes


def rarity_details(rarities: Sequence[Rarity]) -> dict[str, Any]:
    """How many classes each third has, and between which frequencies."""
    return {
        rarity.name: {
            name: {"classes": len(part), "from": part.min().item(), "to": part.max().item()}
            for third, name in enumerate(rarity.thirds)
            if len(part := rarity.frequency_C[rarity.third_C == third])
        }
        for rarity in rarities
    }
