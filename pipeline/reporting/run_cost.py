"""What a checkpoint had cost when it was written: wall time, and that times the number of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluation.results import Result
from pipeline.reporting.report_inputs import Run


@dataclass(frozen=True)
class Cost:
    """Hours of training up to a step. `device_h`: times the ranks of the run's last start."""

    wall_h: float
    device_h: float


def run_of(result: Result, runs: Sequence[Run]) -> Run | None:
    """The run that wrote a result's checkpoint, RUN/checkpoints/step_N; None unless exactly one of `runs` fits."""
    parts = Path(result.checkpoint).parts
    if "checkpoints" not in parts[1:]:
        return None
    name = parts[parts.index("checkpoints", 1) - 1]
    fitting = [run for run in runs if run.name == name]
    return fitting[0] if len(fitting) == 1 else None


def cost_of(result: Result, runs: Sequence[Run]) -> Cost | None:
    """The cost of a result's checkpoint: the wall time logged last at or before its step; None if not logged."""
    run = run_of(result, runs)
    if run is None or result.step is None:
        return None
    return cost_at(run, result.step)


def cost_at(run: Run, step: int) -> Cost | None:
    """The cost of a run up to a step."""
    times_s = [line["wall_time_s"] for line in run.steps if line["step"] <= step and "wall_time_s" in line]
    if not times_s:
        return None
    wall_h = max(times_s) / 3600
    return Cost(wall_h, wall_h * run.world_size)


def device_hours_label(runs: Sequence[Run]) -> str:
    """What to call them: GPU-hours only where all runs were on GPUs."""
    return "GPU-hours" if runs and all(run.device.startswith("cuda") for run in runs) else "device-hours"
