"""Samples that could not be used: named in a file, shown a few times, and no more of them than the recipe allows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from formats.errors import UserError
from pipeline.ranks import Ranks
from pipeline.training.side_files import LineFile

# The share of bad samples is judged over at least this many, so that one among the first few does not stop a run.
_MIN_SAMPLES_JUDGED = 1000
_PROBLEMS_SHOWN = 5


class BadSamples:
    """Those of a run, all stages and starts together; a checkpoint keeps how many there were.

    count: of this rank since this start
    count_before: of all ranks before it
    """

    def __init__(self, run_directory: Path, ranks: Ranks, max_ratio: float, data: str) -> None:
        self.count = 0
        self.count_before = 0
        self._samples_read = 0
        self._lines = LineFile(run_directory / f"bad_samples_rank{ranks.rank}.txt")
        self._ranks = ranks
        self._max_ratio = max_ratio
        self._data = data

    @property
    def name(self) -> str:
        """Of its file in a checkpoint."""
        return "bad_samples"

    def state(self) -> dict[str, Tensor]:
        """How many there were, and how many samples were read. Collective."""
        count = self.count_before + sum(self._ranks.gather_objects(self.count))
        return {"count": torch.tensor(count), "samples_read": torch.tensor(self._samples_read)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on counting from there."""
        self.count, self.count_before, self._samples_read = 0, int(state["count"]), int(state["samples_read"])

    def note(self, problems: Iterable[str], samples_read: int) -> None:
        """What a step met among the samples that all ranks read for it."""
        self._samples_read += samples_read
        problems = list(problems)
        known = (self._listed_before + self.count) if problems else 0
        self.count += len(problems)
        self._lines.append(*(" ".join(problem.split()) for problem in problems))
        for problem in problems[: max(0, _PROBLEMS_SHOWN - known)]:
            print(f"warning: skipped {problem} (all are listed in {self._lines.path})", flush=True)

    @functools.cached_property
    def _listed_before(self) -> int:
        """By earlier starts; asked before this one writes."""
        path = self._lines.path
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def check(self, count: int) -> None:
        """Raise UserError if so many bad samples, of all ranks and starts, are more than allowed."""
        if count > self._max_ratio * max(self._samples_read, _MIN_SAMPLES_JUDGED):
            raise UserError(
                f"{count} of {self._samples_read:,} samples could not be used, more than "
                f"data.max_bad_ratio={self._max_ratio} allows; {self._lines.path} names them; "
                f"`data-prep verify {self._data}` marks them to be left out"
            )
