"""Composition accuracy against a loop, with ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.composition import composition_metrics


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
    assert composition_metrics(images_ND, captions_ND, negatives_ND, categories) == pytest.approx(expected)


def test_mean_is_over_categories_not_over_samples() -> None:
    images_ND, captions_ND = torch.ones(4, 1), torch.ones(4, 1)
    negatives_ND = torch.tensor([[0.0], [0.0], [0.0], [2.0]])
    metrics = composition_metrics(images_ND, captions_ND, negatives_ND, ["a", "a", "a", "b"])
    assert metrics == {"acc": 0.5, "acc/a": 1.0, "acc/b": 0.0}
