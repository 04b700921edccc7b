"""When to save: every so many steps, and when this long nothing was saved."""

from __future__ import annotations

import time

from pipeline.ranks import Ranks
from pipeline.recipe import TrainSection


class SaveSchedule:
    """The same answer on every rank: steps are counted by all, the clock is the main rank's."""

    def __init__(self, train: TrainSection, ranks: Ranks) -> None:
        self._train = train
        self._ranks = ranks
        self._saved_s = time.monotonic()

    def is_due(self, step: int, is_logged: bool) -> bool:
        """Whether to save after `step` steps. The clock is asked at logged steps, where all ranks meet anyway."""
        if step % self._train.save_every_steps == 0:
            return True
        if self._train.save_every_minutes is None or not is_logged:
            return False
        minutes = (time.monotonic() - self._saved_s) / 60
        return self._ranks.any(self._ranks.is_main and minutes >= self._train.save_every_minutes)

    def saved(self) -> None:
        """Count the minutes from now on."""
        self._saved_s = time.monotonic()
