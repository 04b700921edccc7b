"""A run's figures as curves in TensorBoard; points that cannot be written are lost, and nothing else is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipeline.training.side_files import Unwritable


class Curves:
    """Event files in RUN/tensorboard; what earlier starts wrote of steps after `first_step` is not shown."""

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
