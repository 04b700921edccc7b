"""What a task is: which features of a data set it needs, and what it makes of them.

U distinct items of N
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.evaluation.sets.files import Collection
from pipeline.evaluation.tasks.intervals import Outcomes, intervals, means

# Features by the names under which a task asks for them, rows in the order of the collection's items.
Features = Mapping[str, Tensor]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Scores:
    """What a task measures: shares in [0, 1], each with the share that a model gets that knows nothing.

    intervals: lower and upper end of the 95 % interval of each metric, by the bootstrap
    details: how the figures came about, e.g. the weight decay of a probe
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    samples: int
    template_sha256: str | None = None
    intervals: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        outcomes: Mapping[str, Outcomes],
        chance: dict[str, float],
        samples: int,
        template_sha256: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> Scores:
        """Metrics and their intervals from the outcomes of samples."""
        return Scores(means(outcomes), chance, samples, template_sha256, intervals(outcomes), details or {})


@dataclass(frozen=True)
class Task:
    """A benchmark task. It sees features and the data set's labels, never a model.

    name: as CLIP_benchmark calls it in results
    option: as `--tasks` calls it
    sets: the kinds of sets that it is for
    score: the scores from a set and its features, fp32
    collections: what features of a set it needs; raises UserError for one that cannot be used
    is_probe: it fits something to the features of a split `train/`, where they were encoded, and only when it is named;
        others are scored on the CPU
    """

    name: str
    option: str
    sets: tuple[type, ...]
    score: Callable[[Any, Features], Scores]
    collections: Callable[[Any], Mapping[str, Collection]] = methodcaller("collections")
    is_probe: bool = False


def distinct(items: Sequence[Key]) -> tuple[list[Key], Tensor]:
    """The U distinct items in order of appearance, and int64 [N]: where each of `items` is among them."""
    index_of = {item: index for index, item in enumerate(dict.fromkeys(items))}
    return list(index_of), torch.tensor([index_of[item] for item in items], dtype=torch.int64)
