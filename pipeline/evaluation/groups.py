"""Groups of two images and two captions, as in Winoground: is each nearer to its own than to the other?

N groups, D embed_dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.bootstrap import Outcomes
from pipeline.evaluation.composition_files import GroupSet
from pipeline.evaluation.datasets import EvaluationSet
from pipeline.evaluation.feature_store import Collection
from pipeline.evaluation.features import distinct
from pipeline.evaluation.results import Scores
from pipeline.evaluation.tar_samples import ImageFile
from pipeline.evaluation.task import Features, Task

# Of a model that scores at random: of the 24 orders of the four scores, six are right for the captions, six for the
# images, and four for both.
_CHANCE = {"image_acc": 1 / 4, "text_acc": 1 / 4, "acc": 1 / 6}


def _collections(dataset: EvaluationSet) -> dict[str, Collection]:
    assert isinstance(dataset, GroupSet)
    return {
        "images": Collection(dataset.name, "images", distinct(_images(dataset))[0]),
        "captions": Collection(dataset.name, "texts", distinct(_captions(dataset))[0]),
    }


def _images(dataset: GroupSet) -> list[ImageFile]:
    return [image for sample in dataset.samples for image in sample.images]


def _captions(dataset: GroupSet) -> list[str]:
    return [caption for sample in dataset.samples for caption in sample.captions]


def _score(dataset: EvaluationSet, features: Features) -> Scores:
    assert isinstance(dataset, GroupSet)
    image_2N, text_2N = distinct(_images(dataset))[1], distinct(_captions(dataset))[1]
    outcomes = group_outcomes(
        features["images"][image_2N].unflatten(0, (-1, 2)), features["captions"][text_2N].unflatten(0, (-1, 2))
    )
    return Scores.of(outcomes, _CHANCE, samples=len(dataset.samples))


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


TASK = Task(
    name="image_caption_selection",
    option="groups",
    fits=lambda dataset: isinstance(dataset, GroupSet),
    collections=_collections,
    score=_score,
)
