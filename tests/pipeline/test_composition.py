"""Composition and group scores against loops, with ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluation.tasks.composition import composition_outcomes, group_outcomes
from pipeline.evaluation.tasks.intervals import means


def composition_metrics(
    images_ND: Tensor, captions_ND: Tensor, negatives_ND: Tensor, categories: list[str]
) -> dict[str, float]:
    image_N = torch.arange(len(categories)) // 2  # two samples of an image
    return means(composition_outcomes(images_ND, captions_ND, negatives_ND, categories, image_N))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), categories=st.lists(st.sampled_from(["swap_att", "replace_obj", "x"]), min_size=1))
def test_accuracy_equals_a_loop(seed: int, categories: list[str]) -> None:
    generator = torch.Generator().manual_seed(seed)
    # small integers: scores are exact, and some tie
    images_ND, captions_ND, negatives_ND = (
        torch.randint(-2, 3, (len(categories), 3), generator=generator).float() for _ in range(3)
    )
    points: dict[str, list[float]] = {}
    for image, caption, negative, category in zip(
        images_ND.tolist(), captions_ND.tolist(), negatives_ND.tolist(), categories, strict=True
    ):
        margin = sum(i * (c - n) for i, c, n in zip(image, caption, negative, strict=True))
        points.setdefault(category, []).append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    expected = {f"acc/{category}": sum(values) / len(values) for category, values in points.items()}
    expected["acc"] = sum(expected.values()) / len(expected)
    for category, changed in (("swap_att", "attribute"), ("replace_obj", "object")):
        if category in points:
            expected[f"acc/{changed}"] = expected[f"acc/{category}"]
    assert composition_metrics(images_ND, captions_ND, negatives_ND, categories) == pytest.approx(expected)


def test_means_are_over_categories_not_over_samples() -> None:
    images_ND, captions_ND = torch.ones(5, 1), torch.ones(5, 1)
    negatives_ND = torch.tensor([[0.0], [0.0], [0.0], [2.0], [2.0]])
    metrics = composition_metrics(
        images_ND, captions_ND, negatives_ND, ["add_obj", "add_obj", "add_obj", "swap_obj", "replace_rel"]
    )
    assert metrics == pytest.approx(
        {
            "acc": 1 / 3,
            "acc/add_obj": 1,
            "acc/swap_obj": 0,
            "acc/replace_rel": 0,
            "acc/object": 1 / 2,
            "acc/relation": 0,
        }
    )


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_groups_equal_winogrounds_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images_N2D, captions_N2D = (torch.randint(-2, 3, (6, 2, 3), generator=generator).float() for _ in range(2))
    counts = {"image_acc": 0, "text_acc": 0, "acc": 0}
    for images_2D, captions_2D in zip(images_N2D, captions_N2D, strict=True):
        (c0_i0, c1_i0), (c0_i1, c1_i1) = (images_2D @ captions_2D.T).tolist()
        text = c0_i0 > c1_i0 and c1_i1 > c0_i1
        image = c0_i0 > c0_i1 and c1_i1 > c1_i0
        counts = {
            "image_acc": counts["image_acc"] + image,
            "text_acc": counts["text_acc"] + text,
            "acc": counts["acc"] + (image and text),
        }
    metrics = means(group_outcomes(images_N2D, captions_N2D))
    assert metrics == pytest.approx({name: count / 6 for name, count in counts.items()})


def test_chance_of_groups_is_what_random_scores_give() -> None:
    # unit vectors of an image's own scores: any 2 x 2 table of scores can be made
    scores_N22 = torch.rand(40_000, 2, 2, generator=torch.Generator().manual_seed(0))
    metrics = means(group_outcomes(scores_N22, torch.eye(2).expand(40_000, 2, 2)))
    assert metrics == pytest.approx({"image_acc": 1 / 4, "text_acc": 1 / 4, "acc": 1 / 6}, abs=0.01)
