"""Intervals: against the normal approximation, a loop and Wilson's equation, and how often they hold the truth."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.tasks import intervals as bootstrap
from pipeline.evaluation.tasks.intervals import Outcomes, intervals, means, wilson_interval
from pipeline.evaluation.tasks.multi_label import interval_of_mean_average_precision


def test_interval_of_a_share_is_the_normal_one() -> None:
    hits_N = (torch.arange(2000) % 10 < 3).double()
    low, high = intervals({"acc1": Outcomes(hits_N)})["acc1"]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 2000)
    assert [low, high] == pytest.approx([0.3 - half, 0.3 + half], abs=0.003)


def test_captions_are_drawn_with_their_image() -> None:
    # all five captions of an image have the same outcome: there are 400 draws, not 2,000
    hits_I = (torch.arange(400) % 10 < 3).double()
    image_C = torch.arange(400).repeat_interleave(5)
    captions = Outcomes(hits_I[image_C], image_C)
    assert intervals({"x": captions, "y": Outcomes(hits_I)}) == {
        "x": intervals({"y": Outcomes(hits_I)})["y"],
        "y": intervals({"y": Outcomes(hits_I)})["y"],
    }


@settings(deadline=None, max_examples=40)
@given(
    samples=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_mean_of_a_resample_equals_a_loop(samples: list[tuple[float, int, int]], seed: int) -> None:
    rng = random.Random(seed)
    weights = [rng.randint(0, 2) for _ in samples]
    drawn = [sample for sample, weight in zip(samples, weights, strict=True) for _ in range(weight)]
    groups = {group: [value for value, _, of in drawn if of == group] for _, _, group in drawn}
    values_N = torch.tensor([value for value, _, _ in samples], dtype=torch.float64)
    group_N = torch.tensor([group for _, _, group in samples])
    mean = Outcomes(values_N, group_N=group_N).weighted_means(torch.tensor([weights], dtype=torch.float64)).item()
    if not drawn:
        assert math.isnan(mean)
        return
    assert mean == pytest.approx(sum(sum(values) / len(values) for values in groups.values()) / len(groups))


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)
    held = 0
    for seed in range(200):
        hits_N = (torch.rand(150, generator=torch.Generator().manual_seed(seed)) < 0.4).double()
        low, high = intervals({"x": Outcomes(hits_N)})["x"]
        held += low <= 0.4 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_how_many_are_resampled_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values_N = torch.rand(60, generator=torch.Generator().manual_seed(2))
    outcomes = {"a": Outcomes(values_N), "b": Outcomes(values_N, group_N=torch.arange(60) % 7)}
    whole = intervals(outcomes)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 125)
    assert intervals(outcomes) == whole
    assert means(outcomes)["a"] == pytest.approx(values_N.mean().item())


@pytest.mark.parametrize(("share", "units"), [(1.0, 8), (0.0, 8), (1.0, 2000), (0.5, 3), (1.0, 1)])
def test_where_all_outcomes_are_the_same_the_interval_is_wilsons(share: float, units: int) -> None:
    """It holds the shares p from which what was seen lies at most 1.96 standard deviations of p away."""
    low, high = intervals({"x": Outcomes(torch.full((units,), share).double())})["x"]
    assert 0 <= low < share or share == 0 == low
    assert share < high <= 1 or share == 1 == high
    for end in {low, high} - {share}:
        assert abs(end - share) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / units), abs=1e-4)


def test_wilsons_units_are_images_and_every_degenerate_metric_has_one() -> None:
    image_C = torch.arange(40).repeat_interleave(5)
    found = intervals({"x": Outcomes(torch.ones(200).double(), image_C)})
    assert found["x"] == wilson_interval(1.0, 40)
    # each class has its own outcome: the mean over classes is the same in every resample that has both
    by_class = Outcomes(torch.tensor([1.0, 0.0]).repeat(50).double(), group_N=torch.arange(100) % 2)
    assert intervals({"x": by_class})["x"] == wilson_interval(0.5, 100)
    perfect_NC = torch.eye(4).repeat(10, 1)
    assert interval_of_mean_average_precision(perfect_NC, perfect_NC.bool()) == wilson_interval(1.0, 40)
