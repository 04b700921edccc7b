"""Results: one line of JSON per model, checkpoint, dataset and task; metric names are CLIP_benchmark's."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from formats.errors import UserError
from formats.files import make_folder, read_text, to_json, write_atomically, write_json
from formats.locks import open_exclusive

RESULTS_FILE = "results.jsonl"

Share = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it is that gave some features: what results say of it.

    settings_sha256: of a model of another library, whose configuration and preprocessing lie beside its weights
    precision: in which features are computed; "" is fp32
    """

    name: str
    checkpoint: str
    step: int | None
    samples_seen: int | None
    image_size: int
    weights_sha256: str
    tokenizer_sha256: str
    settings_sha256: str = ""
    precision: Literal["", "bf16"] = ""


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
    metrics: dict[str, Share]
    samples: int
    chance: dict[str, Share] = field(default_factory=dict)
    intervals: dict[str, list[Share]] = field(default_factory=dict)
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
    def key(self) -> tuple[str, ...]:
        """A newer result replaces an older one of the same key; two runs may be called alike, seen from two folders."""
        return self.model, self.checkpoint, self.dataset, self.task, self.weights_sha256 or ""

    def to_json(self) -> str:
        """One line of JSON, without the fields that are unknown."""
        return to_json({name: value for name, value in dataclasses.asdict(self).items() if value is not None})


_RESULT = TypeAdapter(Result)


def read_results(file: Path) -> list[Result]:
    """Results of one results.jsonl, in its order; fields that are not a Result's are ignored.

    Raises UserError for a missing file and for a line that is not a result.
    """
    try:
        lines = read_text(file).split("\n")
    except FileNotFoundError as error:
        raise UserError(f"no results at {file}: make them with pipeline/evaluate.py") from error
    return [_parse_result(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse_result(line: str, where: str) -> Result:
    try:
        return _RESULT.validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} is not a result: {f'{field_name}: ' if field_name else ''}{first['msg']}") from None


def write_results(directory: Path, results: Iterable[Result]) -> Path:
    """Merge results into DIRECTORY/results.jsonl, atomically, and write CLIP_benchmark's files; returns the first.

    A result takes the place of the one with the same key. Other jobs may write to the same file meanwhile.
    Raises UserError, and leaves the file as it is, if it holds something else than results.
    """
    file = directory / RESULTS_FILE
    make_folder(directory)
    lock = open_exclusive(directory / f".{RESULTS_FILE}.lock")
    assert lock is not None  # it waits
    with lock:
        merged = {result.key: result for result in (read_results(file) if file.exists() else [])}
        merged.update({result.key: result for result in results})
        # in the order of their keys: the same file, and report, whichever job was the first
        write_atomically(file, "".join(f"{merged[key].to_json()}\n" for key in sorted(merged)))
        write_clip_benchmark_files(directory, merged.values())
    return file


def write_clip_benchmark_files(directory: Path, results: Iterable[Result]) -> None:
    """One file per result under DIRECTORY/clip_benchmark/, as `clip_benchmark eval` writes and `build` reads them."""
    folder = make_folder(directory / "clip_benchmark")
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
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
        # the slug alone, which was once the name, does not tell a/b from a_b
        digest = hashlib.sha256("\0".join(result.key).encode()).hexdigest()
        write_json(folder / f"{slug[-180:]}-{digest[:16]}.json", fields)
        (folder / f"{slug[-200:]}.json").unlink(missing_ok=True)


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
