"""What a task is: which features of a data set it needs, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.evaluation.datasets import EvaluationSet
from pipeline.evaluation.feature_store import Collection
from pipeline.evaluation.results import Scores

# Features by the names under which a task asks for them, rows in the order of the collection's items.
Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A benchmark task. It sees features and the data set's labels, never a model.

    name: as CLIP_benchmark calls it in results
    option: as `--tasks` calls it
    fits: whether a data set has what the task needs
    collections: what features it needs; raises UserError for a data set that cannot be used
    score: the scores from those features, fp32 on the CPU
    automatic: whether it is done where no task is named
    """

    name: str
    option: str
    fits: Callable[[EvaluationSet], bool]
    collections: Callable[[EvaluationSet], Mapping[str, Collection]]
    score: Callable[[EvaluationSet, Features], Scores]
    automatic: bool = True
