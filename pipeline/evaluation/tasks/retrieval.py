"""Image-text retrieval with several captions per image, as CLIP_benchmark defines it.

`image_retrieval_recall@k`: share of captions whose image is among the k images nearest to the caption.
`text_retrieval_recall@k`: share of images with at least one of their captions among the k nearest captions.

I images, C captions, U distinct captions, R rows of a chunk, D embed_dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.sets.layouts import RetrievalSet
from pipeline.evaluation.tasks.intervals import Outcomes
from pipeline.evaluation.tasks.ranking import chance_of_hit, hit_probability
from pipeline.evaluation.tasks.task import Features, Scores, Task, distinct

RECALL_AT = (1, 5, 10)

_ROWS_AT_ONCE = 256


def _score(dataset: RetrievalSet, features: Features) -> Scores:
    captions_I = torch.tensor([len(sample.captions) for sample in dataset.samples])
    image_C = torch.arange(len(captions_I)).repeat_interleave(captions_I)
    _, text_C = distinct(dataset.captions)
    outcomes = retrieval_outcomes(features["images"], features["captions"], text_C, image_C)
    return Scores.of(outcomes, retrieval_chance(captions_I), samples=len(dataset.samples))


def retrieval_outcomes(
    image_features_ID: Tensor, text_features_UD: Tensor, text_C: Tensor, image_C: Tensor
) -> dict[str, Outcomes]:
    """Both recalls at 1, 5, 10, from unit-length features.

    Caption c has features `text_features_UD[text_C[c]]` and belongs to image `image_C[c]`, int64, ascending. Equal
    captions share one row of features, which makes their ties exact. Never holds more than R x U or R x I scores.
    """
    image_ranks = _image_retrieval_ranks(image_features_ID, text_features_UD[text_C], image_C)
    text_ranks = _text_retrieval_ranks(image_features_ID, text_features_UD, text_C, image_C)
    return {
        f"{direction}_retrieval_recall@{k}": Outcomes(hit_probability(*ranks, k), unit)
        for direction, ranks, unit in (("image", image_ranks, image_C), ("text", text_ranks, None))
        for k in RECALL_AT
    }


def retrieval_chance(captions_I: Tensor) -> dict[str, float]:
    """The same metrics for a model that knows nothing; captions_I counts each image's captions, int64."""
    num_images, num_captions = len(captions_I), int(captions_I.sum())
    candidates = {"image": (num_images, torch.ones_like(captions_I)), "text": (num_captions, captions_I)}
    return {
        f"{direction}_retrieval_recall@{k}": chance_of_hit(total, positives_I, k)
        for direction, (total, positives_I) in candidates.items()
        for k in RECALL_AT
    }


def _image_retrieval_ranks(
    image_features_ID: Tensor, caption_features_CD: Tensor, image_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per caption, over all images: better, tied, tied positives (always 1)."""
    better, tied = [], []
    for captions_RD, image_R in zip(
        caption_features_CD.split(_ROWS_AT_ONCE), image_C.split(_ROWS_AT_ONCE), strict=True
    ):
        scores_RI = captions_RD @ image_features_ID.T
        positive_R1 = scores_RI.gather(1, image_R[:, None])
        better.append((scores_RI > positive_R1).sum(dim=1))
        tied.append((scores_RI == positive_R1).sum(dim=1))
    return torch.cat(better), torch.cat(tied), torch.ones_like(image_C)


def _text_retrieval_ranks(
    image_features_ID: Tensor, text_features_UD: Tensor, text_C: Tensor, image_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per image, over all captions: above its best caption, tied with it, and its own captions among the tied."""
    num_images, num_texts = len(image_features_ID), len(text_features_UD)
    multiplicity_U = torch.bincount(text_C, minlength=num_texts)
    better, tied, tied_positives = [], [], []
    for start in range(0, num_images, _ROWS_AT_ONCE):
        scores_RU = image_features_ID[start : start + _ROWS_AT_ONCE] @ text_features_UD.T
        # the captions of these images lie together, since image_C ascends
        own = slice(*torch.searchsorted(image_C, torch.tensor([start, start + len(scores_RU)])).tolist())
        row_P, text_P = image_C[own] - start, text_C[own]
        own_scores_P = scores_RU[row_P, text_P]
        best_R = scores_RU.new_full((len(scores_RU),), -torch.inf)
        best_R.scatter_reduce_(0, row_P, own_scores_P, "amax")
        better.append((scores_RU > best_R[:, None]).long() @ multiplicity_U)
        tied.append((scores_RU == best_R[:, None]).long() @ multiplicity_U)
        tied_positives.append(torch.bincount(row_P[own_scores_P == best_R[row_P]], minlength=len(best_R)))
    return torch.cat(better), torch.cat(tied), torch.cat(tied_positives)


TASK = Task(
    name="zeroshot_retrieval",
    option="retrieval",
    sets=(RetrievalSet,),
    score=_score,
)
