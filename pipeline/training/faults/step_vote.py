"""After every step the ranks tell each other what each wants and where it stands; the host waits for none of it."""

from __future__ import annotations

from formats.errors import UserError
from pipeline.ranks import PendingMaximum, Ranks


class StepVote:
    """What one step's votes came to is known after the next step, on all ranks alike."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: PendingMaximum | None = None

    def cast(self, step: int, samples_seen: int, stop: bool) -> bool:
        """Whether any rank wanted to stop when the step before this one was over.

        Raises UserError if ranks were not at the same step or the same place in the data then.
        """
        before = self._pending
        place = [step, samples_seen]
        self._pending = self._ranks.start_maximum([int(stop), *place, *(-value for value in place)])
        return before is not None and _read(before)

    def close(self) -> None:
        """Wait for the last votes, which nobody reads."""
        if self._pending is not None:
            self._pending.read()
            self._pending = None


def _read(pending: PendingMaximum) -> bool:
    stop, last_step, most_samples, first_step, fewest_samples = pending.read()
    if (last_step, most_samples) != (-first_step, -fewest_samples):
        raise UserError(
            f"ranks have run apart: they stand at steps {-first_step} to {last_step} and at samples {-fewest_samples} "
            f"to {most_samples}; nothing is saved, the last checkpoint is intact"
        )
    return bool(stop)
