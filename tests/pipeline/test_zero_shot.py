"""Zero-shot metrics against a slow loop; the classifier against its definition."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluation.tasks.intervals import means
from pipeline.evaluation.tasks.ranking import hit_probability
from pipeline.evaluation.tasks.zero_shot import build_classifier, classification_chance, classification_outcomes


def classification_metrics(images_ND: Tensor, classifier_CD: Tensor, labels_N: Tensor) -> dict[str, float]:
    return means(classification_outcomes(images_ND, classifier_CD, labels_N))


@given(better=st.integers(0, 4), positives=st.integers(1, 3), negatives=st.integers(0, 4), k=st.integers(1, 6))
def test_hit_probability_is_the_share_of_orderings(better: int, positives: int, negatives: int, k: int) -> None:
    tied = [True] * positives + [False] * negatives
    orderings = list(itertools.permutations(tied))
    hits = sum(any(order[: max(0, k - better)]) for order in orderings)
    counts = [torch.tensor([value]) for value in (better, len(tied), positives)]
    assert hit_probability(*counts, k).item() == pytest.approx(hits / len(orderings))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 30), classes=st.integers(2, 9))
def test_metrics_equal_a_loop(seed: int, images: int, classes: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(images, 6, generator=generator)
    classifier_CD = torch.randn(classes, 6, generator=generator)
    labels = [rng.randrange(classes) for _ in range(images)]

    hits1, hits5, by_class = 0, 0, {}
    for feature, label in zip(features_ND.tolist(), labels, strict=True):
        scores = [math.fsum(a * b for a, b in zip(feature, row, strict=True)) for row in classifier_CD.tolist()]
        order = sorted(range(classes), key=lambda index: -scores[index])
        hits1 += order[0] == label
        hits5 += label in order[:5]
        by_class.setdefault(label, []).append(order[0] == label)
    expected = {
        "acc1": hits1 / images,
        "mean_per_class_recall": sum(sum(hits) / len(hits) for hits in by_class.values()) / len(by_class),
    }
    if classes >= 5:
        expected["acc5"] = hits5 / images
    assert classification_metrics(features_ND, classifier_CD, torch.tensor(labels)) == pytest.approx(expected)


def test_more_rows_than_one_chunk() -> None:
    features_ND = torch.eye(8).repeat(1200, 1)
    labels_N = torch.arange(8).repeat(1200)
    labels_N[:96] = (labels_N[:96] + 1) % 8
    metrics = classification_metrics(features_ND, torch.eye(8), labels_N)
    assert metrics["acc1"] == pytest.approx(1 - 96 / 9600)


def test_a_model_that_knows_nothing_scores_chance_exactly() -> None:
    metrics = classification_metrics(torch.ones(40, 4), torch.ones(20, 4), torch.arange(40) % 20)
    assert metrics == pytest.approx(classification_chance(20))


def test_classes_of_the_same_name_share_the_hit() -> None:
    classifier_CD = torch.eye(3)[[0, 0, 1]]
    metrics = classification_metrics(torch.eye(3)[[0, 1]], classifier_CD, torch.tensor([1, 2]))
    assert metrics["acc1"] == pytest.approx((0.5 + 1) / 2)


def test_classifier_is_the_normalised_mean_of_normalised_prompts() -> None:
    prompts_CTD = torch.tensor([[[10.0, 0.0], [0.0, 0.1]], [[-3.0, 0.0], [-5.0, 0.0]]])
    root = math.sqrt(0.5)
    torch.testing.assert_close(build_classifier(prompts_CTD), torch.tensor([[root, root], [-1.0, 0.0]]))
