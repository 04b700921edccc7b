"""Composition: is an image nearer to its caption than to a hard negative of that caption? After SugarCrepe.

N samples, D embed_dim
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.evaluation.datasets import CompositionSet
from pipeline.evaluation.features import FeatureEncoder, distinct
from pipeline.evaluation.results import Scores

TASK = "image_caption_selection"


def evaluate_composition(encoder: FeatureEncoder, dataset: CompositionSet) -> Scores:
    """Accuracy of each category and `acc`, their mean. Raises UserError as the encoder does."""
    samples = dataset.samples
    images, image_N = distinct([sample.image for sample in samples])
    captions, caption_N = distinct([sample.caption for sample in samples])
    negatives, negative_N = distinct([sample.negative_caption for sample in samples])
    text_features_UD = encoder.encode_texts([*captions, *negatives])
    metrics = composition_metrics(
        encoder.encode_images(images)[image_N],
        text_features_UD[caption_N],
        text_features_UD[negative_N + len(captions)],
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
