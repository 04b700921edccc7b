"""Composition: is an image nearer to its caption than to a hard negative (SugarCrepe), to that of another (Winoground)?

N samples or groups of two images and two captions, D embed_dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evaluation.sets.composition import CompositionSet, GroupSet
from pipeline.evaluation.tasks.intervals import Outcomes
from pipeline.evaluation.tasks.task import Features, Scores, Task, distinct

# What is changed in the negative, by the end of a category's name: papers print the mean of each.
_CHANGED = {"obj": "object", "att": "attribute", "rel": "relation"}


def _score(dataset: CompositionSet, features: Features) -> Scores:
    samples = dataset.samples
    _, image_N = distinct(dataset.images)
    _, text_2N = distinct(dataset.captions)
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
    sets=(CompositionSet,),
    score=_score,
)


# Of a model that scores at random: of the 24 orders of the four scores, six are right for the captions, six for the
# images, and four for both.
_GROUP_CHANCE = {"image_acc": 1 / 4, "text_acc": 1 / 4, "acc": 1 / 6}


def _score_groups(dataset: GroupSet, features: Features) -> Scores:
    image_2N, text_2N = distinct(dataset.images)[1], distinct(dataset.captions)[1]
    outcomes = group_outcomes(
        features["images"][image_2N].unflatten(0, (-1, 2)), features["captions"][text_2N].unflatten(0, (-1, 2))
    )
    return Scores.of(outcomes, _GROUP_CHANCE, samples=len(dataset.samples))


def group_outcomes(images_N2D: Tensor, captions_N2D: Tensor) -> dict[str, Outcomes]:
    """Winoground's image, text and group score under CLIP_benchmark's names; scores that tie are wrong.

    image_acc: each caption is nearer to its own image; text_acc: each image to its own caption; acc: both.
    """
    scores_N22 = images_N2D @ captions_N2D.mT  # image, caption
    own_N2 = scores_N22.diagonal(dim1=1, dim2=2)
    right_image_N = (own_N2 > torch.stack((scores_N22[:, 1, 0], scores_N22[:, 0, 1]), 1)).all(1)
    right_text_N = (own_N2 > torch.stack((scores_N22[:, 0, 1], scores_N22[:, 1, 0]), 1)).all(1)
    right = {"image_acc": right_image_N, "text_acc": right_text_N, "acc": right_image_N & right_text_N}
    return {name: Outcomes(right_N.double()) for name, right_N in right.items()}


GROUP_TASK = Task(
    name="image_caption_selection",
    option="groups",
    sets=(GroupSet,),
    score=_score_groups,
)
