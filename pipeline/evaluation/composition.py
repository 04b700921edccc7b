"""Composition: is an image nearer to its caption than to a hard negative of that caption? After SugarCrepe.

N samples, D embed_dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evaluation.bootstrap import Outcomes
from pipeline.evaluation.composition_files import CompositionSet
from pipeline.evaluation.datasets import EvaluationSet
from pipeline.evaluation.feature_store import Collection
from pipeline.evaluation.features import distinct
from pipeline.evaluation.results import Scores
from pipeline.evaluation.task import Features, Task

# What is changed in the negative, by the end of a category's name: papers print the mean of each.
_CHANGED = {"obj": "object", "att": "attribute", "rel": "relation"}


def _collections(dataset: EvaluationSet) -> dict[str, Collection]:
    assert isinstance(dataset, CompositionSet)
    return {
        "images": Collection(dataset.name, "images", distinct([sample.image for sample in dataset.samples])[0]),
        "captions": Collection(dataset.name, "texts", distinct(_captions(dataset))[0]),
    }


def _captions(dataset: CompositionSet) -> list[str]:
    """All captions, then all negatives."""
    samples = dataset.samples
    return [sample.caption for sample in samples] + [sample.negative_caption for sample in samples]


def _score(dataset: EvaluationSet, features: Features) -> Scores:
    assert isinstance(dataset, CompositionSet)
    samples = dataset.samples
    _, image_N = distinct([sample.image for sample in samples])
    _, text_2N = distinct(_captions(dataset))
    outcomes = composition_outcomes(
        features["images"][image_N],
        features["captions"][text_2N[: len(samples)]],
        features["captions"][text_2N[len(samples) :]],
        [sample.category for sample in samples],
        image_N,
    )
    return Scores.of(outcomes, chance=dict.fromkeys(outcomes, 0.5), samples=len(samples))


def composition_outcomes(
    image_features_ND: Tensor,
    caption_features_ND: Tensor,
    negative_features_ND: Tensor,
    categories: Sequence[str],
    image_N: Tensor,
) -> dict[str, Outcomes]:
    """`acc/CATEGORY` of each, and means over categories: `acc` of all, `acc/object` and so on; a tie counts one half.

    image_N: which image each sample is about, int64
    """
    caption_scores_N = (image_features_ND * caption_features_ND).sum(dim=1)
    negative_scores_N = (image_features_ND * negative_features_ND).sum(dim=1)
    right_N = (caption_scores_N > negative_scores_N).double()
    right_N += 0.5 * (caption_scores_N == negative_scores_N)
    names, category_N = distinct(categories)

    def outcomes(*chosen: str) -> Outcomes:
        rows_n = torch.isin(category_N, torch.tensor([names.index(name) for name in chosen]))
        return Outcomes(right_N[rows_n], distinct(image_N[rows_n].tolist())[1], category_N[rows_n])

    result = {"acc": outcomes(*names)} | {f"acc/{name}": outcomes(name) for name in names}
    for end, changed in _CHANGED.items():
        of_kind = [name for name in names if name.endswith(f"_{end}")]
        if of_kind:
            result[f"acc/{changed}"] = outcomes(*of_kind)
    return result


TASK = Task(
    name="image_caption_selection",
    option="composition",
    fits=lambda dataset: isinstance(dataset, CompositionSet),
    collections=_collections,
    score=_score,
)
