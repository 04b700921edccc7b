"""Average precision against all orders of tied images, and the field's usual definition without ties."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.tasks.multi_label import (
    average_precision,
    interval_of_mean_average_precision,
    mean_average_precision,
)


def _of_order(hits: list[bool]) -> float:
    precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
    return sum(precisions) / len(precisions)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6).filter(
        lambda images: any(positive for _, positive in images)
    )
)
def test_ties_count_as_the_mean_over_all_orders(images: list[tuple[int, bool]]) -> None:
    orders = [
        order
        for order in itertools.permutations(images)
        if all(first[0] >= second[0] for first, second in itertools.pairwise(order))
    ]
    expected = sum(_of_order([positive for _, positive in order]) for order in orders) / len(orders)
    scores_NC = torch.tensor([[float(score)] for score, _ in images])
    positive_NC = torch.tensor([[positive] for _, positive in images])
    assert average_precision(scores_NC, positive_NC).item() == pytest.approx(expected)


def test_mean_is_over_the_classes_that_occur() -> None:
    scores_NC = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 0.0], [1.0, 3.0, 0.0]])
    positive_NC = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert mean_average_precision(scores_NC, positive_NC) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)


def test_interval_holds_the_figure_and_is_about_as_wide_as_resampling_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    positive_NC = torch.rand(300, 4, generator=generator) < 0.3
    scores_NC = torch.randn(300, 4, generator=generator) + positive_NC
    low, high = interval_of_mean_average_precision(scores_NC, positive_NC)
    by_hand = []
    for _ in range(200):
        rows_N = torch.randint(300, (300,), generator=generator)
        by_hand.append(mean_average_precision(scores_NC[rows_N], positive_NC[rows_N]))
    expected = torch.tensor(by_hand).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert low < mean_average_precision(scores_NC, positive_NC) < high
    assert [low, high] == pytest.approx(expected, abs=0.02)
