"""The order of samples of a set that is read by a balance: laps in which each sample comes once or not at all.

A lap is laid out as an epoch without a balance, but of the shards of which something is drawn, and of that alone. Laps
follow each other so that no sample comes late in one and early in the next: of what a lap would begin with, that with
which the lap before ended waits. So samples that stand near each other, as those of a batch, are different ones.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from pipeline.data.draws import Draws
from pipeline.data.sample_order import LapPlan, SampleOrder, Window


class BalancedOrder(SampleOrder):
    """Endless order of the samples that `draws` has in its laps, one lap after the other.

    A set of no more than two windows is one, and its samples are kept apart; of a larger one the shards are.
    """

    def __init__(self, draws: Draws, window_shards: int, seed: int, set_number: int = 0) -> None:
        super().__init__([shard.samples for shard in draws.balance.shards], window_shards, seed, set_number)
        self.draws = draws
        self.epochs = draws
        self._draws_all = False
        self._is_one_window = len(self.shard_sizes) <= 2 * window_shards
        self._first_rows = np.array(list(accumulate(self.shard_sizes, initial=0)))

    def largest_batch(self, positions: range) -> int:
        """So many samples in a row, anywhere in a stretch of positions, are different ones."""
        first, last = self.draws.lap_at(positions.start), self.draws.lap_at(positions.stop - 1)
        return min((self._distance(lap) for lap in range(first + 1, last + 1)), default=self.num_samples)

    def _distance(self, lap: int) -> int:
        """How far apart a sample's places in a lap and in the one before are at least."""
        if self._is_one_window:
            return min(self._length(lap - 1), self._length(lap)) // 3 + 1
        after = self._samples_outside(lap - 1, self._shard_windows(lap - 1)[::-1])
        before = self._samples_outside(lap, self._shard_windows(lap))
        return int((after + before).min()) + 1

    def _samples_outside(self, lap: int, windows: list[np.ndarray]) -> np.ndarray:
        """int64 [shards]: how many samples come in a lap's windows before that of the shard; all if it has none."""
        counts = self.draws.counts(lap)
        outside = np.full(len(self.shard_sizes), counts.sum())
        so_far = 0
        for shards in windows:
            outside[shards] = so_far
            so_far += counts[shards].sum()
        return outside

    def _length(self, lap: int) -> int:
        return self.draws.lap_start(lap + 1) - self.draws.lap_start(lap)

    def _lap_at(self, position: int) -> tuple[int, int]:
        lap = self.draws.lap_at(position)
        return lap, position - self.draws.lap_start(lap)

    def _first_after(self, lap: int) -> Window:
        """The first window that comes after a lap; small sets may have laps without one."""
        return self._lap(self.draws.lap_at(self.draws.lap_start(lap + 1))).windows[0]

    def _plan_lap(self, lap: int) -> LapPlan:
        return self._lay_out([shards.tolist() for shards in self._shard_windows(lap)], self.draws.counts(lap).tolist())

    def _shard_windows(self, lap: int) -> list[np.ndarray]:
        """The shards of each window."""
        if self._is_one_window:
            return [np.flatnonzero(self.draws.counts(lap))]
        shards = keep_apart(self._drawn_shards(lap - 1), self._drawn_shards(lap))
        third = len(shards) // 3  # which no window goes beyond
        parts = [part for part in np.split(shards, [third, len(shards) - third]) if len(part)]
        return [window for part in parts for window in np.array_split(part, -(-len(part) // self.window_shards))]

    def _drawn_shards(self, lap: int) -> np.ndarray:
        """As they are shuffled, without regard to the lap before."""
        if lap < 0:
            return np.empty(0, np.int64)
        shards = np.array(self._shuffled_shards(lap))
        drawn: np.ndarray = shards[self.draws.counts(lap)[shards] > 0]
        return drawn

    def _draw_window(self, lap: int, window: int) -> np.ndarray:
        shards, starts = self._lap(lap).windows[window]
        if self._is_one_window:
            rows = keep_apart(self._shuffled_rows(lap - 1), self._shuffled_rows(lap))
            first_rows = self._first_rows[shards]
            offsets: np.ndarray = rows + (starts - first_rows)[np.searchsorted(first_rows, rows, side="right") - 1]
            return offsets
        drawn = [start + self.draws.drawn(lap, shard) for shard, start in zip(shards, starts, strict=True)]
        return self._window_rng(lap, window).permutation(np.concatenate(drawn))

    def _shuffled_rows(self, lap: int) -> np.ndarray:
        """Numbers, in the set, of the samples of a lap that is one window, without regard to the lap before."""
        if lap < 0:
            return np.empty(0, np.int64)
        rows = [first + self.draws.drawn(lap, shard) for shard, first in enumerate(self._first_rows[:-1])]
        return self._window_rng(lap, 0).permutation(np.concatenate(rows))

    def __reduce__(self) -> tuple[type[SampleOrder], tuple[object, ...]]:
        return BalancedOrder, (self.draws, self.window_shards, self._seed, self._set_number)


def keep_apart(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """`now` in another order, in which none of the last third of `before` is in the first third.

    Both have each element once; a third is that of the shorter one. The last third stays as it is, so that what comes
    after `now` may be kept apart from it without knowing what came before.
    """
    third = min(len(before), len(now)) // 3
    head = now[: 2 * third]
    may_be_first = ~np.isin(head, before[len(before) - third :])
    first = np.flatnonzero(may_be_first)[:third]
    return np.concatenate([head[first], np.delete(head, first), now[2 * third :]])
