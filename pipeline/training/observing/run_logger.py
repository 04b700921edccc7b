"""Where a run's figures go: metrics.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipeline.files import write_atomically
from pipeline.recipe import LogSection
from pipeline.training.observing.wandb_run import WandbRun
from pipeline.training.stage_plan import Stage, steps_left

METRICS = "metrics.jsonl"


class RunLogger:
    """Writes on the main rank; what a resumed run will write again is removed first.

    A disk that is full stops no training: lines wait until there is room, points of curves are lost.
    """

    def __init__(self, run_directory: Path, first_step: int, stages: Sequence[Stage], section: LogSection) -> None:
        self._path = run_directory / METRICS
        self._unwritten: list[str] = []
        self._has_warned = False
        self._stages = stages
        self._tensorboard: SummaryWriter | None = SummaryWriter(
            str(run_directory / "tensorboard"), purge_step=first_step + 1
        )
        self._wandb = None if section.wandb == "off" else WandbRun(run_directory, section)
        kept = _drop_lines_after(self._path, first_step)
        self._wall_time_before_s = kept[-1].get("wall_time_s", 0.0) if kept else 0.0

    def log(self, metrics: dict[str, Any]) -> None:
        """One logged step: a line of JSON, a point on each curve, a line of progress.

        `wall_time_s` comes in counted from this start and goes out counted over all starts of the run.
        """
        metrics = {**metrics, "wall_time_s": self._wall_time_before_s + metrics["wall_time_s"]}
        self._unwritten.append(json.dumps(metrics) + "\n")
        try:
            self._write_lines()
            self._add_points(metrics)
        except OSError as error:
            if not self._has_warned:
                print(f"warning: {self._path.parent} cannot be written: {error}; training goes on", flush=True)
            self._has_warned = True
        eta_s = steps_left(self._stages, metrics["step"]) * metrics["seconds_per_step"]
        print(progress_line(metrics, self._stages[-1].end_step, eta_s), flush=True)

    def _write_lines(self) -> None:
        size_bytes = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.writelines(self._unwritten)
        except OSError:
            os.truncate(self._path, size_bytes)  # no half lines
            raise
        self._unwritten = []

    def _add_points(self, metrics: dict[str, Any]) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer is None:  # the thread of the one before died of the full disk
            writer = SummaryWriter(str(self._path.parent / "tensorboard"))
        for name, value in metrics.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                writer.add_scalar(name if name.startswith("eval/") else f"train/{name}", value, metrics["step"])
        self._tensorboard = writer
        if self._wandb:
            self._wandb.log(metrics)

    def close(self) -> None:
        """Flush what is buffered."""
        with contextlib.suppress(OSError):
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.close()


def progress_line(metrics: dict[str, Any], total_steps: int, eta_s: float) -> str:
    """What a person watching wants to know, in one line."""
    eta = format_duration(eta_s) if metrics["step"] < total_steps else "done"
    stage = f"{metrics['stage']}  " if "stage" in metrics else ""
    loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
    return (
        f"{stage}step {metrics['step']:>6,}/{total_steps:,}  epoch {metrics['epoch']:.2f}  loss {loss}  "
        f"lr {metrics['lr']:.2e}  {metrics['samples_per_s']:,.0f} samples/s  {metrics['tokens_per_s']:,.0f} tokens/s  "
        f"masked {metrics['mask_ratio']:.1%}  data wait {metrics['data_wait_share']:.1%}  ETA {eta}"
    )


def format_duration(seconds: float) -> str:
    """3723 -> "1h02m", 63 -> "1m03s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove lines beyond a step, and one that was cut off; returns what is left, parsed."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            metrics = json.loads(line)
            if metrics["step"] <= step:
                kept.append(metrics)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed while writing it
    if path.exists():
        write_atomically(path, "".join(json.dumps(metrics) + "\n" for metrics in kept))
    return kept


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
