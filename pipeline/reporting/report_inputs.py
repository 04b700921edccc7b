"""What a report is made of: runs (recipe, metrics) and results, found in the directories and files given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.errors import UserError
from pipeline.evaluation.results import RESULTS_FILE, Result, read_results
from pipeline.recipe import Recipe
from pipeline.recipe_files import read_recipe_file
from pipeline.training.observing.run_logger import METRICS
from pipeline.training.run_record import read_record

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Run:
    """One training run: its directory's name, its recipe, its logged steps in order, and where it last started."""

    name: str
    recipe: Recipe | None
    steps: tuple[dict[str, Any], ...]
    world_size: int = 1
    device: str = ""

    def by_stage(self) -> list[Run]:
        """The logged steps of each stage as runs of their own, of the same name; the run itself if it has no stages."""
        groups = itertools.groupby(self.steps, key=lambda step: step.get("stage"))
        return [replace(self, steps=tuple(steps)) for _, steps in groups] or [self]

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Samples seen (else steps) and values of a metric, at the logged steps that have both."""
        points = []
        for step in self.steps:
            position, value = step.get("samples_seen", step.get("step")), step.get(metric)
            if isinstance(position, (int, float)) and isinstance(value, (int, float)):
                points.append((float(position), float(value)))
        return [position for position, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class ReportInputs:
    """All runs and results, in the order given; a result that is found twice counts once.

    outputs: the directories of the results, where an evaluation leaves its features too
    """

    runs: tuple[Run, ...]
    results: tuple[Result, ...]
    outputs: tuple[Path, ...]


def read_inputs(paths: Sequence[Path]) -> ReportInputs:
    """Read run directories, directories with results, and results files.

    Raises UserError for a path that is none of these, and if nothing at all is found.
    """
    runs: list[Run] = []
    results: dict[tuple[str, str, str, str], Result] = {}
    outputs: dict[Path, None] = {}
    for path in paths:
        result_files = _result_files(path)
        is_run = (path / METRICS).is_file()
        if not result_files and not is_run:
            raise UserError(
                f"nothing to report in {path}: expected a run directory ({METRICS}), a directory with {RESULTS_FILE}, "
                f"or such a file"
            )
        if is_run:
            runs.append(_read_run(path))
        results.update({result.key: result for file in result_files for result in read_results(file)})
        outputs |= dict.fromkeys(file.resolve().parent for file in result_files)
    return ReportInputs(tuple(runs), tuple(results.values()), tuple(outputs))


def _result_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in (path / RESULTS_FILE, path / "evaluation" / RESULTS_FILE) if file.is_file()]


def _read_run(directory: Path) -> Run:
    recipe, record = directory / RECIPE_FILE, read_record(directory)
    return Run(
        name=directory.resolve().name,
        recipe=read_recipe_file(str(recipe)) if recipe.is_file() else None,
        steps=tuple(_read_steps(directory / METRICS)),
        world_size=int(record.get("world_size", 1)),
        device=str(record.get("device", "")),
    )


def _read_steps(file: Path) -> list[dict[str, Any]]:
    """Logged steps in order. A line that was cut off is passed over; of a step logged twice the later line counts."""
    steps: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            fields = json.loads(line)
            steps[int(fields["step"])] = fields
        except (ValueError, KeyError, TypeError):
            continue
    return [steps[step] for step in sorted(steps)]
