"""Training runs as they left their directories: recipe, log, record, and the hashes of the weights they wrote."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from formats.errors import UserError
from pipeline.recipe import Recipe
from pipeline.recipe_files import read_recipe_file
from pipeline.training.checkpoints.checkpoint import AVERAGED_WEIGHTS, WEIGHTS, list_checkpoints, read_contents
from pipeline.training.observing.run_logger import METRICS
from pipeline.training.run_record import RECIPE, RECORD, read_record

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Cost:
    """Hours of training up to a step. `device_h`: times the ranks of the run's last start."""

    wall_h: float
    device_h: float


@dataclass(frozen=True)
class Run:
    """One training run: its recipe, its logged steps in order, and where it last started.

    steps: what was logged, numbers and the stage's name alone
    damaged_lines: of the log, which could not be read
    weights: sha256 of the weights of its checkpoints, by their paths in the run
    """

    name: str
    directory: Path
    recipe: Recipe | None
    steps: tuple[dict[str, Any], ...]
    damaged_lines: int = 0
    world_size: int = 1
    device: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)

    def by_stage(self) -> list[Run]:
        """The logged steps of each stage as runs of their own, of the same name; the run itself if it has no stages."""
        groups = itertools.groupby(self.steps, key=lambda step: step.get("stage"))
        return [replace(self, steps=tuple(steps)) for _, steps in groups] or [self]

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Samples seen (else steps) and values of a metric, at the logged steps that have both."""
        points = [
            (float(step.get("samples_seen", step["step"])), float(step[metric]))
            for step in self.steps
            if metric in step
        ]
        return [position for position, _ in points], [value for _, value in points]

    def cost_at(self, step: int) -> Cost | None:
        """The cost up to a step: the wall time logged last at or before it; None if none is."""
        times_s = [line["wall_time_s"] for line in self.steps if line["step"] <= step and "wall_time_s" in line]
        return Cost(max(times_s) / 3600, max(times_s) / 3600 * self.world_size) if times_s else None


def device_hours_label(runs: Sequence[Run]) -> str:
    """What to call hours of devices: GPU-hours only where all runs were on GPUs; empty without runs."""
    if not runs:
        return ""
    return "GPU-hours" if all(run.device.startswith("cuda") for run in runs) else "device-hours"


def read_run(directory: Path) -> Run:
    """The run in a directory, for now of the directory's name; raises UserError for a damaged file."""
    recipe, record = directory / RECIPE, read_record(directory)
    world_size = record.get("world_size", 1)
    if not isinstance(world_size, int) or world_size < 1:
        raise UserError(f"{directory / RECORD} is not the record of a run: world_size is {world_size!r}")
    steps, damaged_lines = _read_steps(directory / METRICS)
    return Run(
        name=directory.resolve().name,
        directory=directory.resolve(),
        recipe=read_recipe_file(str(recipe)) if recipe.exists() else None,
        steps=tuple(steps),
        damaged_lines=damaged_lines,
        world_size=world_size,
        device=str(record.get("device", "")),
        weights=dict(_read_weights(directory)),
    )


def _read_weights(run_directory: Path) -> Iterator[tuple[str, str]]:
    """The hash of each checkpoint's weights and of their average; checkpoints that do not count are passed over."""
    for checkpoint in list_checkpoints(run_directory):
        try:
            files = read_contents(checkpoint).files
        except UserError:
            continue
        for name in (WEIGHTS, AVERAGED_WEIGHTS):
            if name in files:
                yield str(Path(CHECKPOINTS, checkpoint.name, name)), files[name].sha256


def _read_steps(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Logged steps in order, and how many lines are damaged, other than a last one that was cut off.

    Of a step logged twice the later line counts. Raises UserError if no line is a logged step.
    """
    steps: dict[int, dict[str, Any]] = {}
    damaged = 0
    *lines, cut_off = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in filter(str.strip, lines):
        step = _parse_step(line)
        damaged += step is None
        if step:
            steps[step["step"]] = step
    if last := _parse_step(cut_off):
        steps[last["step"]] = last
    if not steps and (damaged or cut_off.strip()):
        raise UserError(f"{file} holds no logged step of a training run: put the run's own back, or leave the run out")
    return [steps[step] for step in sorted(steps)], damaged


def _parse_step(line: str) -> dict[str, Any] | None:
    """The numbers of a line of the log, and its stage; None for what is no such line."""
    try:
        fields = json.loads(line)
        numbers = {name: value for name, value in fields.items() if _is_number(value)}
    except (ValueError, AttributeError, RecursionError):
        return None
    if not isinstance(numbers.get("step"), int):
        return None
    return numbers | ({"stage": fields["stage"]} if isinstance(fields.get("stage"), str) else {})


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
