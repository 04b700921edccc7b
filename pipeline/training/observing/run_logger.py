"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases, and a line on the terminal."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from formats.errors import UserError
from formats.files import write_atomically
from pipeline.recipe import LogSection
from pipeline.training.side_files import LineFile, Unwritable
from pipeline.training.stage_plan import Stage, steps_left

METRICS = "metrics.jsonl"
_WANDB_ID = "wandb_id"


class RunLogger:
    """Writes on the main rank; what a resumed run will write again is removed first.

    A disk that is full stops no training: lines wait until there is room, points of curves are lost.
    """

    def __init__(self, run_directory: Path, first_step: int, stages: Sequence[Stage], section: LogSection) -> None:
        self._stages = stages
        self._curves = Curves(run_directory, first_step)
        self._wandb = None if section.wandb == "off" else WandbRun(run_directory, section)
        kept = _drop_lines_after(run_directory / METRICS, first_step)
        self._lines = LineFile(run_directory / METRICS)
        self._wall_time_before_s = kept[-1].get("wall_time_s", 0.0) if kept else 0.0

    def log(self, metrics: dict[str, Any]) -> None:
        """One logged step: a line of JSON, a point on each curve, a line of progress.

        `wall_time_s` comes in counted from this start and goes out counted over all starts of the run.
        """
        metrics = {**metrics, "wall_time_s": self._wall_time_before_s + metrics["wall_time_s"]}
        if self._lines.append(json.dumps(metrics)):
            self._curves.add(metrics)  # not on a disk that is known to be full: each try leaves a file
        if self._wandb:
            self._wandb.log(metrics)
        eta_s = steps_left(self._stages, metrics["step"]) * metrics["seconds_per_step"]
        print(progress_line(metrics, self._stages[-1].end_step, eta_s), flush=True)

    def close(self) -> None:
        """Write what waits or is buffered."""
        self._lines.append()
        self._curves.close()
        if self._wandb:
            self._wandb.close()


def progress_line(metrics: dict[str, Any], total_steps: int, eta_s: float) -> str:
    """What a person watching wants to know, in one line."""
    eta = format_duration(eta_s) if metrics["step"] < total_steps else "done"
    stage = f"{metrics['stage']}  " if "stage" in metrics else ""
    value = metrics.get("mlm_loss", metrics["loss"])
    loss = "not finite" if value is None else f"{value:.4f}"
    masked = "words masked" if metrics["mask_ratio"] is None else f"masked {metrics['mask_ratio']:.1%}"
    return (
        f"{stage}step {metrics['step']:>6,}/{total_steps:,}  epoch {metrics['epoch']:.2f}  loss {loss}  "
        f"lr {metrics['lr']:.2e}  {metrics['samples_per_s']:,.0f} samples/s  {metrics['tokens_per_s']:,.0f} tokens/s  "
        f"{masked}  data wait {metrics['data_wait_share']:.1%}  ETA {eta}"
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


class Curves:
    """TensorBoard's event files in RUN/tensorboard; what earlier starts wrote of steps after `first_step` is not shown.

    Points that cannot be written are lost, and nothing else is.
    """

    def __init__(self, run_directory: Path, first_step: int) -> None:
        self._directory = run_directory / "tensorboard"
        self._unwritable = Unwritable(self._directory, "points of its curves are lost")
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        self._writer: SummaryWriter | None = SummaryWriter(str(self._directory), purge_step=first_step + 1)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """A point on each curve."""
        writer, self._writer = self._writer, None
        try:
            if writer is None:  # the thread of the one before died of an error
                writer = SummaryWriter(str(self._directory))
            for name, value in metrics.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    writer.add_scalar(name if name.startswith("eval/") else f"train/{name}", value, metrics["step"])
        except OSError as error:
            self._unwritable.say(error)
            return
        self._writer = writer

    def close(self) -> None:
        """Flush what is buffered."""
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        threading.excepthook = self._hook

    def _on_thread_error(self, raised: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands its error to `add`, and would print it as well."""
        is_its_own = type(raised.thread).__module__.startswith("tensorboard.")
        if not (is_its_own and isinstance(raised.exc_value, OSError)):
            self._hook(raised)


class WandbRun:
    """Weights & Biases: the same figures as in metrics.jsonl, one run there for one run directory.

    A resumed run goes on with the same id, kept in RUN/wandb_id.

    Raises UserError if wandb is not installed or refuses.
    """

    def __init__(self, run_directory: Path, section: LogSection) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(f"log.wandb={section.wandb} needs wandb: pip install 'cluster-clip[wandb]'") from None
        id_file = run_directory / _WANDB_ID
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=section.wandb_project,
                name=run_directory.resolve().name,
                id=run_id,
                resume="allow",
                dir=str(run_directory),
                mode="offline" if section.wandb == "offline" else "online",
            )
        except Exception as error:  # of its own kinds, by version
            reason = " ".join(str(error).split())
            raise UserError(f"wandb cannot start: {reason}; log.wandb=offline needs no network") from error
        write_atomically(id_file, run_id + "\n")
        self._unwritable = Unwritable(run_directory / "wandb", "figures are missing there")

    def log(self, metrics: dict[str, Any]) -> None:
        """One logged step."""
        try:
            self._run.log({name: value for name, value in metrics.items() if value is not None}, step=metrics["step"])
        except OSError as error:
            self._unwritable.say(error)

    def close(self) -> None:
        """Send what is left."""
        with contextlib.suppress(OSError):
            self._run.finish()
