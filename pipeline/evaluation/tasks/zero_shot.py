"""Zero-shot classification with prompt ensembles, as CLIP_benchmark and open_clip define it.

N images, C classes, T templates, U distinct prompts, D embed_dim
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.word_counts import WORD, WordFrequencies
from pipeline.evaluation.sets.layouts import ClassificationSet, MultiLabelSet
from pipeline.evaluation.tasks.intervals import Outcomes
from pipeline.evaluation.tasks.multi_label import multi_label_scores
from pipeline.evaluation.tasks.ranking import hit_probability
from pipeline.evaluation.tasks.task import Features, Scores, Task, distinct

_ROWS_AT_ONCE = 4096
# of the classes, by how often their names occur in the training captions
_THIRDS = ("rare", "medium", "frequent")


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
        frequency_C = class_frequencies(dataset.class_names, dataset.words)
        third_C = thirds(frequency_C)
        by_frequency = long_tail_outcomes(outcomes["acc1"].values_N, labels_N, third_C)
        outcomes, chance = outcomes | by_frequency, chance | dict.fromkeys(by_frequency, 1 / num_classes)
        details = long_tail_details(frequency_C, third_C, dataset.words)
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


def class_frequencies(names: Sequence[str], words: WordFrequencies) -> Tensor:
    """Of each class the frequency of the rarest word in its name [C]; 0 if the captions have no such word."""
    of_names = [WORD.findall(name.lower()) for name in names]
    frequencies = [min((words.frequencies.get(word, 0.0) for word in found), default=0.0) for found in of_names]
    return torch.tensor(frequencies, dtype=torch.float64)


def thirds(frequency_C: Tensor) -> Tensor:
    """Which third of the classes each is in, from the rarest; int64 [C]. Equally frequent ones are in the same."""
    rarer_C = torch.searchsorted(frequency_C.sort().values, frequency_C)
    return 3 * rarer_C // len(frequency_C)


def long_tail_outcomes(hits_N: Tensor, labels_N: Tensor, third_C: Tensor) -> dict[str, Outcomes]:
    """`acc1/rare`, `/medium` and `/frequent`: the mean over a third's classes of the accuracy on each."""
    outcomes = {}
    for third, name in enumerate(_THIRDS):
        rows_N = third_C[labels_N] == third
        if rows_N.any():
            outcomes[f"acc1/{name}"] = Outcomes(hits_N[rows_N], group_N=labels_N[rows_N])
    return outcomes


def long_tail_details(frequency_C: Tensor, third_C: Tensor, words: WordFrequencies) -> dict[str, Any]:
    """How many classes each third has, between which frequencies, and of which counts."""
    ranges = {
        name: {"classes": len(part), "from": part.min().item(), "to": part.max().item()}
        for third, name in enumerate(_THIRDS)
        if len(part := frequency_C[third_C == third])
    }
    return {"word_frequency": ranges, "word_counts_sha256": words.sha256}


TASK = Task(
    name="zeroshot_classification",
    option="zeroshot",
    sets=(ClassificationSet, MultiLabelSet),
    score=_score,
)
