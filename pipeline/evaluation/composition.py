"""Composition: is an image nearer to its caption than to a hard negative of that caption? After SugarCrepe.

N samples, D embed_dim
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.evaluation.datasets import CompositionSet, EvaluationSet
from pipeline.evaluation.feature_store import Collection
from pipeline.evaluation.features import distinct
from pipeline.evaluation.results import Scores
from pipeline.evaluation.task import Features, Task


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
    metrics = composition_metrics(
        features["images"][image_N],
        features["captions"][text_2N[: len(samples)]],
        features["captions"][text_2N[len(samples) :]],
        [sample.category for sample in samples],
    )
    return Scores(metrics, chance=dict.fromkeys(metrics, 0.5), samples=len(samples))


def composition_metrics(
    image_features_ND: Tensor,
    caption_features_ND: Tensor,
    negative_features_ND: Tensor,
    categories: Sequence[str],
) -> dict[str, float]:
    """`acc/CATEGORY` for each category and `acc`, the mean of those; a tie counts one half."""
    caption_scores_N = (image_features_ND * caption_features_ND).sum(dim=1)
    negative_scores_N = (image_features_ND * negative_features_ND).sum(dim=1)
    right_N = (caption_scores_N > negative_scores_N).double()
    right_N += 0.5 * (caption_scores_N == negative_scores_N)
    names, category_N = distinct(categories)
    by_category = {f"acc/{name}": right_N[category_N == index].mean().item() for index, name in enumerate(names)}
    return {"acc": sum(by_category.values()) / len(by_category), **by_category}


TASK = Task(
    name="image_caption_selection",
    option="composition",
    fits=lambda dataset: isinstance(dataset, CompositionSet),
    collections=_collections,
    score=_score,
)
