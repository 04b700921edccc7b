"""What a run does about steps that went wrong: go on without them, go back to its last checkpoint, or stop."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.recipe import FaultsSection
from pipeline.training.faults.step_guard import StepOutcome

Action = Literal["go_on", "roll_back", "stop"]

# A loss is compared with at least this share of the window.
_MIN_HISTORY = 0.25
# The spread of losses counts as at least this share of their median: on a plateau it is next to nothing.
_MIN_SPREAD = 0.01
# A median absolute deviation in standard deviations of a normal distribution.
_DEVIATIONS_PER_MAD = 1.4826


@dataclass(frozen=True)
class Fault:
    """A step that went wrong, in words, and what follows from it."""

    outcome: StepOutcome
    kind: Literal["non_finite", "spike"]
    action: Action
    text: str


class FaultPolicy:
    """Judges steps in order. Every rank holds one, sees the same outcomes and comes to the same result."""

    def __init__(self, section: FaultsSection) -> None:
        self._section = section
        self._losses: deque[float] = deque(maxlen=section.spike_window_steps)
        self._skipped: list[int] = []
        self._roll_backs: list[int] = []
        self._in_spike = False

    def judge(self, outcomes: Iterable[StepOutcome]) -> list[Fault]:
        """The faults among these steps."""
        faults = [self._judge(outcome) for outcome in outcomes]
        return [fault for fault in faults if fault is not None]

    @property
    def name(self) -> str:
        """Of its file in a checkpoint."""
        return "faults"

    def state(self) -> dict[str, Tensor]:
        """What it remembers, for a run that goes on from a checkpoint to judge as this one."""
        return {
            "losses": torch.tensor(list(self._losses), dtype=torch.float64),
            "skipped_steps": torch.tensor(self._skipped, dtype=torch.int64),
            "roll_backs": torch.tensor(self._roll_backs, dtype=torch.int64),
            "in_spike": torch.tensor(self._in_spike),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Remember what another did."""
        self._losses.extend(state["losses"].tolist())
        self._skipped = state["skipped_steps"].tolist()
        self._roll_backs = state["roll_backs"].tolist()
        self._in_spike = bool(state["in_spike"])

    def rolled_back(self, step: int) -> None:
        """Note that weights went back; losses from before say nothing about those to come."""
        self._roll_backs.append(step)
        self._losses.clear()
        self._in_spike = False

    def _judge(self, outcome: StepOutcome) -> Fault | None:
        if outcome.skipped:
            return self._judge_skipped(outcome)
        threshold = self._threshold()
        self._losses.append(outcome.loss)
        began = self._in_spike
        self._in_spike = threshold is not None and outcome.loss > threshold
        if not self._in_spike or began:  # of a spike that lasts only the beginning is said
            return None
        text = f"step {outcome.step:,}: the loss is {outcome.loss:.4g}, above {threshold:.4g} (faults.spike_deviations)"
        return self._fault(
            outcome, "spike", "go_on" if self._section.on_spike == "warn" else self._section.on_spike, text
        )

    def _judge_skipped(self, outcome: StepOutcome) -> Fault:
        recent = [step for step in self._skipped if step > outcome.step - self._section.skip_window_steps]
        self._skipped = recent = [*recent, outcome.step]
        text = f"step {outcome.step:,}: the loss is {outcome.loss:.4g}, "
        text += "gradients are not finite, " if outcome.features_finite else "features are not finite, "
        text += "no rank applied the update"
        if len(recent) > self._section.max_skipped_steps:
            text += f"; {len(recent)} such steps among {self._section.skip_window_steps} (faults.max_skipped_steps)"
            return self._fault(outcome, "non_finite", "stop", text)
        on = self._section.on_non_finite
        return self._fault(outcome, "non_finite", "go_on" if on == "skip" else on, text)

    def _fault(self, outcome: StepOutcome, kind: Literal["non_finite", "spike"], action: Action, text: str) -> Fault:
        if action == "roll_back" and len(self._roll_backs) >= self._section.max_roll_backs:
            action, text = "stop", f"{text}; after {len(self._roll_backs)} roll-backs (faults.max_roll_backs)"
        return Fault(outcome, kind, action, text)

    def _threshold(self) -> float | None:
        """Median plus so many median absolute deviations of the losses in the window; none while there are few."""
        if len(self._losses) < _MIN_HISTORY * self._section.spike_window_steps:
            return None
        median = statistics.median(self._losses)
        deviation = _DEVIATIONS_PER_MAD * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._section.spike_deviations * max(deviation, _MIN_SPREAD * abs(median))
