"""What goes wrong with steps and samples, what a run does about it, and where it is said.

A step whose loss or gradients are not finite changes nothing, on no rank; train_step.py sees to that on the device, and
the host reads later what happened.

B pairs of this rank, S steps
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from formats.errors import UserError
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.recipe import FaultsSection
from pipeline.training.faults.agreement import RankCheck
from pipeline.training.side_files import LineFile
from pipeline.training.step_report import StepReport

Action = Literal["go_on", "roll_back", "stop"]

# A loss is compared with at least this share of the window.
_MIN_HISTORY = 0.25
# The spread of losses counts as at least this share of their median: on a plateau it is next to nothing.
_MIN_SPREAD = 0.01
# A median absolute deviation in standard deviations of a normal distribution.
_DEVIATIONS_PER_MAD = 1.4826
_SAMPLES_SHOWN = 3
# The share of bad samples is judged over at least this many, so that one among the first few does not stop a run.
_MIN_SAMPLES_JUDGED = 1000
_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step, the same on all ranks: `loss` is the whole batch's, `skipped` that it changed nothing.

    For skipped steps:
    suspects: samples of this rank whose features were not finite, or all of its samples if no rank had such
    features_finite: whether no rank had such
    """

    step: int
    loss: float
    skipped: bool
    suspects: tuple[str, ...] = ()
    features_finite: bool = True


@dataclass(frozen=True)
class _Step:
    """A step's outcome before the host has read it. outcome_2: this rank's loss, and 1 if the step was skipped."""

    number: int
    outcome_2: Tensor
    finite_B: Tensor
    keys: list[str]


@dataclass(frozen=True)
class Fault:
    """A step that went wrong, in words, and what follows from it."""

    outcome: StepOutcome
    kind: Literal["non_finite", "spike"]
    action: Action
    text: str


class FaultPolicy:
    """Finds faults among steps, in order. Every rank holds one, sees the same outcomes and comes to the same result."""

    name = "faults"  # of its file in a checkpoint

    def __init__(self, section: FaultsSection) -> None:
        self._section = section
        self._losses: deque[float] = deque(maxlen=section.spike_window_steps)
        self._skipped: list[int] = []
        self._roll_backs: list[int] = []
        self._in_spike = False

    def find(self, outcomes: Iterable[StepOutcome]) -> list[Fault]:
        """The faults among these steps."""
        faults = [self._find(outcome) for outcome in outcomes]
        return [fault for fault in faults if fault is not None]

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

    def _find(self, outcome: StepOutcome) -> Fault | None:
        if outcome.skipped:
            return self._find_skipped(outcome)
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

    def _find_skipped(self, outcome: StepOutcome) -> Fault:
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


class FaultLog:
    """Those of one rank; it names its own samples, and the main rank also says what happened to all."""

    def __init__(self, run_directory: Path, ranks: Ranks) -> None:
        self._lines = LineFile(run_directory / f"faults_rank{ranks.rank}.jsonl")
        self._ranks = ranks

    def note(self, faults: Iterable[Fault]) -> None:
        """What was found since the last time; none is fine, and what could not be written then is tried again."""
        lines = [line for line in map(self._say, faults) if line is not None]
        self._lines.append(*map(json.dumps, lines))

    def _say(self, fault: Fault) -> dict[str, Any] | None:
        """A line on the terminal; returns what this rank has to write down of it."""
        outcome = fault.outcome
        if self._ranks.is_main:
            print(f"warning: {fault.text}", flush=True)
        if outcome.suspects and not outcome.features_finite:
            shown = ", ".join(outcome.suspects[:_SAMPLES_SHOWN])
            more = f" and {len(outcome.suspects) - _SAMPLES_SHOWN} more" * (len(outcome.suspects) > _SAMPLES_SHOWN)
            print(f"warning: rank {self._ranks.rank}: not finite in step {outcome.step:,}: {shown}{more}", flush=True)
        if not (outcome.suspects or self._ranks.is_main):
            return None
        return {
            "step": outcome.step,
            "kind": fault.kind,
            "action": fault.action,
            # JSON knows neither infinity nor NaN
            "loss": outcome.loss if math.isfinite(outcome.loss) else str(outcome.loss),
            "samples": list(outcome.suspects),
        }


class StepGuard:
    """Notes every step without waiting for the device, and looks at them when asked; the same on all ranks."""

    def __init__(
        self, section: FaultsSection, rank_check: RankCheck, log: FaultLog, is_fp16: bool, ranks: Ranks
    ) -> None:
        self.policy = FaultPolicy(section)  # a checkpoint keeps what it remembers
        self._rank_check = rank_check
        self._log = log
        self._is_fp16 = is_fp16
        self._ranks = ranks
        self._unread: list[_Step] = []

    def note(self, step: int, report: StepReport, batches: Sequence[Batch]) -> None:
        """A step that was taken; `step` counts it too."""
        outcome_2 = torch.stack((report.means_R[0], report.skipped))
        keys = [key for batch in batches for key in batch.keys]
        self._unread.append(_Step(step, outcome_2, report.finite_B, keys))

    def must_roll_back(self, step: int) -> bool:
        """After what happened since the last time; raises UserError to stop. Collective; waits for the device.

        step: how many steps were taken
        """
        faults = self.policy.find(self.read())
        self._log.note(faults)
        self._rank_check.compare(step)
        worst = {fault.action: fault for fault in faults}
        if "stop" in worst:
            raise UserError(f"{worst['stop'].text}; nothing is saved, the last checkpoint is intact")
        return "roll_back" in worst

    def read(self) -> list[StepOutcome]:
        """The outcomes of all steps since the last time, in order. Collective; waits for the device."""
        steps, self._unread = self._unread, []
        if not steps:
            return []
        outcomes_S2 = self._ranks.mean(torch.stack([step.outcome_2 for step in steps])).tolist()
        return [self._outcome(step, *outcome) for step, outcome in zip(steps, outcomes_S2, strict=True)]

    def _outcome(self, step: _Step, loss: float, skipped: float) -> StepOutcome:
        # in fp16 DeepSpeed skips steps until it has found a loss scale: nothing is wrong with those
        if not skipped or (self._is_fp16 and math.isfinite(loss)):
            return StepOutcome(step.number, loss, False)
        suspects = [key for key, finite in zip(step.keys, step.finite_B.tolist(), strict=True) if not finite]
        features_finite = not self._ranks.any(bool(suspects))
        return StepOutcome(step.number, loss, True, tuple(step.keys if features_finite else suspects), features_finite)


class BadSamples:
    """Those of a run, all stages and starts together; a checkpoint keeps how many there were.

    count: of this rank since this start
    count_before: of all ranks before it
    """

    name = "bad_samples"  # of its file in a checkpoint

    def __init__(self, run_directory: Path, ranks: Ranks, max_ratio: float, data: str) -> None:
        self.count = 0
        self.count_before = 0
        self._samples_read = 0
        self._lines = LineFile(run_directory / f"bad_samples_rank{ranks.rank}.txt")
        self._ranks = ranks
        self._max_ratio = max_ratio
        self._data = data

    def state(self) -> dict[str, Tensor]:
        """How many there were, and how many samples were read. Collective."""
        return {"count": torch.tensor(self.total()), "samples_read": torch.tensor(self._samples_read)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on counting from there."""
        self.count, self.count_before, self._samples_read = 0, int(state["count"]), int(state["samples_read"])

    def total(self) -> int:
        """Of all ranks and starts. Collective."""
        return self.count_before + sum(self._ranks.gather_objects(self.count))

    def note(self, problems: Iterable[str], samples_read: int) -> None:
        """What a step met among the samples that all ranks read for it."""
        self._samples_read += samples_read
        problems = list(problems)
        known = (self._listed_before + self.count) if problems else 0
        self.count += len(problems)
        self._lines.append(*(" ".join(problem.split()) for problem in problems))
        for problem in problems[: max(0, _PROBLEMS_SHOWN - known)]:
            print(f"warning: skipped {problem} (all are listed in {self._lines.path})", flush=True)

    @functools.cached_property
    def _listed_before(self) -> int:
        """By earlier starts; asked before this one writes."""
        path = self._lines.path
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def check(self, count: int) -> None:
        """Raise UserError if so many bad samples, of all ranks and starts, are more than allowed."""
        if count > self._max_ratio * max(self._samples_read, _MIN_SAMPLES_JUDGED):
            raise UserError(
                f"{count} of {self._samples_read:,} samples could not be used, more than "
                f"data.max_bad_ratio={self._max_ratio} allows; {self._lines.path} names them; "
                f"`data-prep verify {self._data}` marks them to be left out"
            )
