"""Where the time of a step goes: stretches between marks, on the device's own clock where it has one."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

PHASES = ("data", "masks", "forward", "loss", "backward", "update")


class PhaseClock:
    """Measures the step between `begin` and `read`, where alone the host waits for the device; free otherwise.

    Work that is still queued on a GPU when the step begins belongs to its first phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self._is_running = False

    def begin(self) -> None:
        """Start a measured step."""
        self._is_running = True
        self._marks = []
        self.end("")

    def end(self, phase: str) -> None:
        """What happened since the mark before was this phase."""
        if self._is_running:
            self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Share of the measured step that each phase took, {} if none was measured. Waits for the device."""
        marks, self._marks, self._is_running = self._marks, [], False
        if len(marks) < 2:
            return {}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in pairwise(marks):
            seconds[phase] += _seconds_between(before, after)
        total_s = sum(seconds.values())
        return {f"{phase}_share": value / total_s for phase, value in seconds.items()} if total_s else {}

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float)
        assert isinstance(after, float)
        return after - before
    return float(before.elapsed_time(after)) / 1000
