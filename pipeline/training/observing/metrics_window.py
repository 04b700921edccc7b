"""What happens between two lines of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.train_step import REPORT_NAMES


class MetricsWindow:
    """Sums on the device, so that nothing waits for it before the line is written; and where the time went."""

    def __init__(self, ranks: Ranks) -> None:
        self.steps = 0
        self._sums: Tensor = torch.zeros(len(REPORT_NAMES), device=ranks.device)
        self._is_loss = torch.arange(len(REPORT_NAMES), device=ranks.device) == REPORT_NAMES.index("loss")
        self._skipped: Tensor = torch.zeros((), device=ranks.device)
        self._start_s = time.perf_counter()
        self._data_wait_s = 0.0

    def timed_fetch(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """The next micro-batches; the time this takes counts as waiting for data."""
        start_s = time.perf_counter()
        fetched = [next(batches) for _ in range(count)]
        self._data_wait_s += time.perf_counter() - start_s
        return fetched

    def add(self, report: Tensor, skipped: Tensor) -> None:
        """One step's report (train_step.REPORT_NAMES); if it was skipped (1, else 0) its loss does not count."""
        self._sums += torch.where(self._is_loss & (skipped > 0), 0, report)
        self._skipped += skipped
        self.steps += 1

    def close(self) -> tuple[Tensor, float, float]:
        """(means, then the number of skipped steps; seconds; share of them spent waiting for data)."""
        counts = self.steps - self._skipped * self._is_loss
        means = torch.cat((self._sums / counts, self._skipped.view(1)))
        means.sum().item()  # waits for the device, so that the time is that of finished work
        seconds = time.perf_counter() - self._start_s
        return means, seconds, self._data_wait_s / seconds
