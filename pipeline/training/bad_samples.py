"""Samples that could not be used: named in a file, shown a few times, and no more of them than the recipe allows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError

# The share of bad samples is judged over at least this many, so that one among the first few does not stop a run.
_MIN_SAMPLES_JUDGED = 1000
_PROBLEMS_SHOWN = 5


class BadSamples:
    """Those of one rank since this start of the run, all stages together."""

    def __init__(self, run_directory: Path, rank: int, max_ratio: float, data: str) -> None:
        self.count = 0
        self._samples_read = 0
        self._file = run_directory / f"bad_samples_rank{rank}.txt"
        self._max_ratio = max_ratio
        self._data = data

    def note(self, problems: Iterable[str], samples_read: int) -> None:
        """What a step met among the samples that all ranks read for it."""
        self._samples_read += samples_read
        problems = list(problems)
        if not problems:
            return
        self.count += len(problems)
        known = self._file.read_text().count("\n") if self._file.exists() else 0
        with self._file.open("a") as file:
            file.writelines(" ".join(problem.split()) + "\n" for problem in problems)
        for problem in problems[: max(0, _PROBLEMS_SHOWN - known)]:
            print(f"warning: skipped {problem} (all are listed in {self._file})", flush=True)

    def check(self, count_of_all_ranks: int) -> None:
        """Raise UserError if more samples are bad than allowed."""
        if count_of_all_ranks > self._max_ratio * max(self._samples_read, _MIN_SAMPLES_JUDGED):
            raise UserError(
                f"{count_of_all_ranks} of {self._samples_read:,} samples could not be used, more than "
                f"data.max_bad_ratio={self._max_ratio} allows; {self._file} names them; "
                f"`data-prep verify {self._data}` marks them to be left out"
            )
