"""What follows from steps that went wrong."""

from __future__ import annotations

import random

import pytest

from pipeline.recipe import FaultsSection
from pipeline.training.faults.guard import FaultPolicy, StepOutcome


def losses(*values: float, first_step: int = 1) -> list[StepOutcome]:
    return [StepOutcome(step, loss, skipped=False) for step, loss in enumerate(values, start=first_step)]


def skipped(*steps: int) -> list[StepOutcome]:
    return [StepOutcome(step, float("nan"), skipped=True, suspects=("a",)) for step in steps]


def actions(policy: FaultPolicy, outcomes: list[StepOutcome]) -> list[tuple[int, str]]:
    return [(fault.outcome.step, fault.action) for fault in policy.find(outcomes)]


def test_more_skipped_steps_than_the_window_may_hold_stop_the_run() -> None:
    policy = FaultPolicy(FaultsSection(max_skipped_steps=2, skip_window_steps=10))
    assert actions(policy, skipped(1, 5, 12)) == [(1, "go_on"), (5, "go_on"), (12, "go_on")]
    (fault,) = policy.find(skipped(14))
    assert fault.action == "stop"
    assert "3 such steps among 10 (faults.max_skipped_steps)" in fault.text


@pytest.mark.parametrize("action", ["roll_back", "stop"])
def test_the_recipe_says_what_follows(action: str) -> None:
    policy = FaultPolicy(FaultsSection(on_non_finite=action, on_spike=action, spike_window_steps=20))
    assert actions(policy, skipped(1)) == [(1, action)]
    assert actions(policy, losses(*[3.0] * 20, 30.0)) == [(21, action)]


def test_roll_backs_are_counted_and_end_in_a_stop() -> None:
    policy = FaultPolicy(FaultsSection(on_non_finite="roll_back", max_roll_backs=1))
    assert actions(policy, skipped(3)) == [(3, "roll_back")]
    policy.rolled_back(3)
    (fault,) = policy.find(skipped(4))
    assert fault.action == "stop"
    assert "faults.max_roll_backs" in fault.text


def test_a_spike_is_said_once_and_ordinary_noise_never() -> None:
    noise = random.Random(0)
    falling = [8 * 0.995**step * (1 + 0.05 * noise.gauss(0, 1)) for step in range(600)]
    policy = FaultPolicy(FaultsSection())
    assert actions(policy, losses(*falling)) == []
    # a spike that lasts, an ordinary step, another
    rest = [8.0] * 3 + [0.4] + [8.0]
    assert actions(policy, losses(*rest, first_step=601)) == [(601, "go_on"), (605, "go_on")]


def test_a_plateau_is_no_reason_to_be_jumpy() -> None:
    """The loss of a model that has learnt nothing yet is constant but for tiny differences."""
    plateau = [4.85 + 1e-5 * (step % 7) for step in range(200)]
    assert actions(FaultPolicy(FaultsSection()), losses(*plateau, 4.9)) == []
    assert actions(FaultPolicy(FaultsSection()), losses(*plateau, 5.5)) == [(201, "go_on")]


def test_few_losses_are_nothing_to_compare_with() -> None:
    assert actions(FaultPolicy(FaultsSection(spike_window_steps=200)), losses(*[1.0] * 49, 100.0)) == []
    assert actions(FaultPolicy(FaultsSection(spike_window_steps=200)), losses(*[1.0] * 50, 100.0)) == [(51, "go_on")]
