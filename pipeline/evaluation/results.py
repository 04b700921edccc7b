"""Results: one line of JSON per model, checkpoint, dataset and task; metric names are CLIP_benchmark's."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import write_atomically, write_json

RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """Scores of one checkpoint on one dataset, and what is needed to tell whether two results may be compared.

    samples, expected_samples: how many were evaluated, and how many the set says it has; unequal ones are refused
    content_sha256: of the bytes of all images and texts, in order
    """

    model: str
    checkpoint: str
    dataset: str
    task: str
    metrics: dict[str, float]
    samples: int
    chance: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    expected_samples: int | None = None
    template_sha256: str | None = None
    content_sha256: str | None = None
    weights_sha256: str | None = None
    step: int | None = None
    samples_seen: int | None = None
    batch_size: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    wall_time_s: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """A newer result replaces an older one of the same key."""
        return self.model, self.checkpoint, self.dataset, self.task

    def to_json(self) -> str:
        """One line of JSON, without the fields that are unknown."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def read_results(file: Path) -> list[Result]:
    """Results of one results.jsonl, in its order; fields that are not a Result's are ignored.

    Raises UserError for a missing file and for a line that is not a result.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no results at {file}: make them with pipeline/evaluate.py") from error
    return [_parse_result(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse_result(line: str, where: str) -> Result:
    known = {item.name for item in dataclasses.fields(Result)}
    try:
        fields: dict[str, Any] = json.loads(line)
        result = Result(**{name: value for name, value in fields.items() if name in known})
        numbers = [*result.metrics.values(), *result.chance.values()]
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not a result: {error}") from error
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise UserError(f"{where} is not a result: its metrics must be numbers")
    return result


def write_results(directory: Path, results: Iterable[Result]) -> Path:
    """Merge results into DIRECTORY/results.jsonl, atomically, and write CLIP_benchmark's files; returns the first.

    A result takes the place of the one with the same key. Other jobs may write to the same file meanwhile.
    Raises UserError, and leaves the file as it is, if it holds something else than results.
    """
    file = directory / RESULTS_FILE
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / f".{RESULTS_FILE}.lock"):
        merged = {result.key: result for result in (read_results(file) if file.exists() else [])}
        merged.update({result.key: result for result in results})
        # in the order of their keys: the same file, and report, whichever job was the first
        write_atomically(file, "".join(f"{merged[key].to_json()}\n" for key in sorted(merged)))
        write_clip_benchmark_files(directory, merged.values())
    return file


def write_clip_benchmark_files(directory: Path, results: Iterable[Result]) -> None:
    """One file per result under DIRECTORY/clip_benchmark/, as `clip_benchmark eval` writes and `build` reads them."""
    folder = directory / "clip_benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        fields = {
            "dataset": result.dataset,
            "model": result.model,
            "pretrained": result.checkpoint,
            "task": result.task,
            "metrics": result.metrics,
            "language": "en",
        }
        name = f"{result.dataset}_{result.checkpoint}_{result.model}_en_{result.task}"
        write_json(folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[-200:]}.json", fields)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def format_table(results: Sequence[Result]) -> str:
    """Results as aligned text, in percent, chance beside each figure."""
    rows = [("dataset", "metric", "%", "chance", "samples")]
    for result in results:
        for metric, value in result.metrics.items():
            chance = result.chance.get(metric)
            rows.append(
                (
                    result.dataset,
                    metric,
                    f"{100 * value:.2f}",
                    "" if chance is None else f"{100 * chance:.2f}",
                    f"{result.samples:,}",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
