"""Retrieval recalls against a slow loop, with several captions per image, ties and chunks."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluation.tasks import retrieval
from pipeline.evaluation.tasks.intervals import means
from pipeline.evaluation.tasks.retrieval import RECALL_AT, retrieval_chance, retrieval_outcomes


def retrieval_metrics(images_ID: Tensor, texts_UD: Tensor, text_C: Tensor, image_C: Tensor) -> dict[str, float]:
    return means(retrieval_outcomes(images_ID, texts_UD, text_C, image_C))


def _metrics(images_ID: Tensor, captions_CD: Tensor, captions_I: list[int]) -> dict[str, float]:
    image_C = torch.arange(len(captions_I)).repeat_interleave(torch.tensor(captions_I))
    return retrieval_metrics(images_ID, captions_CD, torch.arange(len(captions_CD)), image_C)


def _loop(images_ID: Tensor, captions_CD: Tensor, captions_I: list[int]) -> dict[str, float]:
    """CLIP_benchmark's definition, one query at a time."""
    owner = [image for image, count in enumerate(captions_I) for _ in range(count)]
    images, captions = images_ID.tolist(), captions_CD.tolist()

    def score(first: list[float], second: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(first, second, strict=True))

    metrics = {}
    for k in RECALL_AT:
        hits = 0
        for c, caption in enumerate(captions):
            order = sorted(range(len(images)), key=lambda i: -score(caption, images[i]))
            hits += owner[c] in order[:k]
        metrics[f"image_retrieval_recall@{k}"] = hits / len(captions)
        hits = 0
        for i, image in enumerate(images):
            order = sorted(range(len(captions)), key=lambda c: -score(image, captions[c]))
            hits += any(owner[c] == i for c in order[:k])
        metrics[f"text_retrieval_recall@{k}"] = hits / len(images)
    return metrics


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), captions_I=st.lists(st.integers(1, 4), min_size=1, max_size=16))
def test_recalls_equal_a_loop(seed: int, captions_I: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    images_ID = torch.randn(len(captions_I), 5, generator=generator)
    captions_CD = torch.randn(sum(captions_I), 5, generator=generator)
    assert _metrics(images_ID, captions_CD, captions_I) == pytest.approx(_loop(images_ID, captions_CD, captions_I))


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunks_do_not_change_the_recalls(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    captions_I = [1, 5, 2, 2, 1, 3, 1]
    generator = torch.Generator().manual_seed(rows)
    images_ID, captions_CD = torch.randn(7, 4, generator=generator), torch.randn(15, 4, generator=generator)
    monkeypatch.setattr(retrieval, "_ROWS_AT_ONCE", rows)
    assert _metrics(images_ID, captions_CD, captions_I) == pytest.approx(_loop(images_ID, captions_CD, captions_I))


def test_one_matching_caption_of_five_is_enough_for_text_retrieval() -> None:
    # image 0: one caption is right, four point to image 1; image 1: its one caption is far from both
    images_ID = torch.eye(3)[:2]
    captions_CD = torch.stack([torch.eye(3)[0], *[0.9 * torch.eye(3)[1]] * 4, torch.eye(3)[2]])
    metrics = _metrics(images_ID, captions_CD, [5, 1])
    assert metrics["text_retrieval_recall@1"] == pytest.approx(0.5)
    assert metrics["image_retrieval_recall@1"] == pytest.approx((1 + 0 * 4 + 0.5) / 6)


@given(captions_I=st.lists(st.integers(1, 5), min_size=1, max_size=30))
def test_a_model_that_knows_nothing_scores_chance_exactly(captions_I: list[int]) -> None:
    images_ID, captions_CD = torch.ones(len(captions_I), 4), torch.ones(sum(captions_I), 4)
    assert _metrics(images_ID, captions_CD, captions_I) == pytest.approx(retrieval_chance(torch.tensor(captions_I)))


def test_chance_is_what_random_scores_give() -> None:
    captions_I = [1, 5, 3, 2, 2, 5, 1, 1]
    rng = random.Random(0)
    hits, draws = 0, 4000
    owner = [image for image, count in enumerate(captions_I) for _ in range(count)]
    for _ in range(draws):
        top5 = rng.sample(owner, 5)
        hits += sum(image in top5 for image in range(8)) / 8
    chance = retrieval_chance(torch.tensor(captions_I))
    assert chance["text_retrieval_recall@5"] == pytest.approx(hits / draws, abs=0.01)
    assert chance["image_retrieval_recall@5"] == pytest.approx(5 / 8)


def test_equal_captions_of_two_images_share_the_hit() -> None:
    # captions 0 and 1 are the same text, of images 0 and 1, and both images are nearest to it
    images_ID = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    metrics = retrieval_metrics(images_ID, torch.eye(2), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    assert metrics["text_retrieval_recall@1"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics["text_retrieval_recall@5"] == 1


def test_order_of_the_samples_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    images_ID, texts_UD = torch.randn(12, 3, generator=generator), torch.randn(6, 3, generator=generator)
    text_C = torch.arange(12) % 6  # each text belongs to two images
    forward = retrieval_metrics(images_ID, texts_UD, text_C, torch.arange(12))
    backward = retrieval_metrics(images_ID.flip(0), texts_UD, text_C.flip(0), torch.arange(12))
    assert forward == pytest.approx(backward)
