"""Zero-shot classification with prompt ensembles, as CLIP_benchmark and open_clip define it.

N images, C classes, T templates, U distinct prompts, D embed_dim
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.sets.layouts import ClassificationSet, MultiLabelSet
from pipeline.evaluation.tasks.intervals import Outcomes
from pipeline.evaluation.tasks.multi_label import multi_label_scores
from pipeline.evaluation.tasks.ranking import hit_probability
from pipeline.evaluation.tasks.rarity import accuracy_by_rarity, rarity_details, rarity_of_classes
from pipeline.evaluation.tasks.task import Features, Scores, Task, distinct

_ROWS_AT_ONCE = 4096


def _score(dataset: ClassificationSet | MultiLabelSet, features: Features) -> Scores:
    num_classes = len(dataset.class_names)
    classifier_CD = _classifier(dataset, features)
    template_sha256 = hashlib.sha256("\n".join(dataset.templates).encode()).hexdigest()
    if isinstance(dataset, MultiLabelSet):
        return multi_label_scores(dataset, features["images"] @ classifier_CD.T, template_sha256)
    labels_N = torch.tensor([sample.label for sample in dataset.samples])
    outcomes = classification_outcomes(features["images"], classifier_CD, labels_N)
    chance, details = classification_chance(num_classes), None
    if dataset.words is not None:
        rarities = rarity_of_classes(dataset.class_names, dataset.words)
        by_rarity = accuracy_by_rarity(outcomes["acc1"].values_N, labels_N, rarities)
        outcomes, chance = outcomes | by_rarity, chance | dict.fromkeys(by_rarity, 1 / num_classes)
        details = rarity_details(rarities) | {"word_counts_sha256": dataset.words.sha256}
    return Scores.of(outcomes, chance, len(dataset.samples), template_sha256, details)


def _classifier(dataset: ClassificationSet | MultiLabelSet, features: Features) -> Tensor:
    _, prompt_CT = distinct(dataset.prompts)
    return build_classifier(features["prompts"][prompt_CT.view(len(dataset.class_names), -1)])


def predict(dataset: ClassificationSet, features: Features) -> Tensor:
    """The nearest class of each image, int64 [N]; of classes that tie, the first."""
    classifier_CD = _classifier(dataset, features)
    return torch.cat([(part_RD @ classifier_CD.T).argmax(dim=1) for part_RD in features["images"].split(_ROWS_AT_ONCE)])


def build_classifier(prompt_features_CTD: Tensor) -> Tensor:
    """Unit-length class features [C, D]: the mean over the templates of unit-length prompt features."""
    return F.normalize(F.normalize(prompt_features_CTD, dim=-1).mean(dim=1), dim=-1)


def classification_outcomes(image_features_ND: Tensor, classifier_CD: Tensor, labels_N: Tensor) -> dict[str, Outcomes]:
    """acc1, acc5 (from five classes on) and mean_per_class_recall, over the classes that occur in labels_N."""
    parts = image_features_ND.split(_ROWS_AT_ONCE)
    return outcomes_of_scores((part_RD @ classifier_CD.T for part_RD in parts), labels_N)


def outcomes_of_scores(scores: Iterable[Tensor], labels_N: Tensor) -> dict[str, Outcomes]:
    """The same from the scores of all classes, [R, C] for consecutive rows."""
    better, tied, start = [], [], 0
    for scores_RC in scores:
        num_classes = scores_RC.shape[1]
        label_scores_R1 = scores_RC.gather(1, labels_N[start : start + len(scores_RC), None])
        better.append((scores_RC > label_scores_R1).sum(dim=1))
        tied.append((scores_RC == label_scores_R1).sum(dim=1))
        start += len(scores_RC)
    better_N, tied_N, one_N = torch.cat(better), torch.cat(tied), torch.ones_like(labels_N)
    hits1_N = hit_probability(better_N, tied_N, one_N, k=1)
    outcomes = {"acc1": Outcomes(hits1_N)}
    if num_classes >= 5:
        outcomes["acc5"] = Outcomes(hit_probability(better_N, tied_N, one_N, k=5))
    return outcomes | {"mean_per_class_recall": Outcomes(hits1_N, group_N=labels_N)}


def classification_chance(num_classes: int) -> dict[str, float]:
    """The same metrics for a model that knows nothing."""
    chance = {"acc1": 1 / num_classes, "mean_per_class_recall": 1 / num_classes}
    return chance | ({"acc5": 5 / num_classes} if num_classes >= 5 else {})


TASK = Task(
    name="zeroshot_classification",
    option="zeroshot",
    sets=(ClassificationSet, MultiLabelSet),
    score=_score,
)
