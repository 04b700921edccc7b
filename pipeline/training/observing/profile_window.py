"""A trace of some steps by torch's profiler, for chrome://tracing or ui.perfetto.dev, and a table of its operators."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.ranks import Ranks
from pipeline.training.side_files import Unwritable

DIRECTORY = "profile"
_ROWS = 30


class ProfileWindow:
    """Records steps `first` to `last`, counted from 1 as the log does; None: nothing."""

    def __init__(self, steps: tuple[int, int] | None, run_directory: Path, ranks: Ranks) -> None:
        self._steps = steps if ranks.is_main else None  # ranks do the same: one trace is enough
        self._directory = run_directory / DIRECTORY
        self._is_cuda = ranks.device.type == "cuda"
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        """Start if this is the first of the steps."""
        if self._steps is not None and step == self._steps[0]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
            self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profiler.start()

    def after(self, step: int) -> Path | None:
        """Stop and write if this was the last; returns the trace's file then, None where it cannot be written."""
        if self._profiler is None or self._steps is None or step < self._steps[1]:
            return None
        if self._is_cuda:
            torch.cuda.synchronize()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            return self._write(profiler, self._directory / f"steps_{self._steps[0]}_to_{self._steps[1]}.json.gz")
        except OSError as error:
            Unwritable(self._directory, "the trace is lost").say(error)
            return None

    def _write(self, profiler: profile, trace: Path) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        by = "self_device_time_total" if self._is_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_ROWS)
        trace.with_suffix("").with_suffix(".txt").write_text(table)
        return trace
