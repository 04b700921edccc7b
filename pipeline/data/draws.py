"""How often a sample comes: a pure function of (seed, epoch, sample) and the sample's rate.

With a rate p and h and u in [0, 1), hashes of (seed, sample) and (seed, epoch, sample), it comes in epoch e

    rotation    floor(h + (e + 1) p) - floor(h + e p) times: in any E epochs within one of E p times
    bernoulli   floor(p) times, and once more where u is less than the rest

Where rates are above 1 an epoch is read in laps, as many as the largest rate rounded up, and in a lap each sample comes
once or not at all. Its c copies in an epoch are spread over the laps as an epoch's rates are over epochs: through lap l
of L it came floor(h + l c / L) times, and with rotation floor(h + l p / L) over all laps of all epochs.

Rates are whole numbers of 2^-24, hashes of 2^-32, and all arithmetic is that of 64-bit integers: the same everywhere.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from formats.balance import Balance
from formats.errors import UserError
from pipeline.recipe import DrawKind

_ONE = 1 << 32
# Distinguishes the hashes that share a seed and a set from each other, and from the draws of sample_order.py.
_PHASE_STREAM, _CHANCE_STREAM = 2, 3


class Draws:
    """Which samples of a set are drawn in each lap, by a balance; raises UserError for one that draws next to nothing.

    The laps follow each other in one stream of positions from 0 up. Counts of a lap are made once, in a pass over the
    rates, and kept: 8 bytes for each shard.
    """

    def __init__(self, balance: Balance, kind: DrawKind, seed: int, set_number: int = 0) -> None:
        if balance.drawn_per_epoch < 1:
            raise UserError(
                f"{balance.directory} draws less than one sample per epoch: make it again with `data-prep balance` "
                "and a larger --keep"
            )
        self.balance = balance
        self.laps_per_epoch = math.ceil(balance.max_rate)
        self.num_samples = round(balance.drawn_per_epoch)
        self._kind = kind
        self._seed = (seed, set_number)
        self._sizes = [shard.samples for shard in balance.shards]
        self._first_rows = list(accumulate(self._sizes, initial=0))
        # of each lap so far its counts by shard, and where it starts; replaced whole, as several threads may ask
        self._known: tuple[list[np.ndarray], list[int]] = ([], [0])

    def drawn(self, lap: int, shard: int) -> np.ndarray:
        """Indices of a shard's samples that come in a lap, in order."""
        return np.flatnonzero(next(self._by_lap(shard, range(lap, lap + 1))))

    def counts(self, lap: int) -> np.ndarray:
        """int64 [shards]: how many samples of each shard come in a lap."""
        return self._through(lap + 1)[0][lap]

    def lap_start(self, lap: int) -> int:
        """Where a lap starts in the stream of positions."""
        return self._through(lap)[1][lap]

    def lap_at(self, position: int) -> int:
        """The lap in which a position is."""
        while self._known[1][-1] <= position:
            laps = max(len(self._known[0]), position // self.num_samples * self.laps_per_epoch)
            self._through(laps + self.laps_per_epoch)
        return bisect.bisect_right(self._known[1], position) - 1

    def start(self, epoch: int) -> int:
        """Where an epoch starts in the stream of positions."""
        return self.lap_start(epoch * self.laps_per_epoch)

    def at(self, position: int) -> int:
        """The epoch in which a position is."""
        return self.lap_at(position) // self.laps_per_epoch

    def samples(self, first_epoch: int, epochs: float) -> int:
        """How many come in so many epochs from one on; of a part of an epoch the same part."""
        last, part = first_epoch + int(epochs), epochs % 1
        of_last = round(part * (self.start(last + 1) - self.start(last)))  # which a whole last batch may reach into
        return self.start(last) - self.start(first_epoch) + of_last

    def describe(self) -> str:
        """What is drawn, in words."""
        balance = self.balance
        laps = "" if self.laps_per_epoch == 1 else f", an epoch in {self.laps_per_epoch} laps"
        return (
            f"{self._kind} of {float(balance.drawn_per_epoch):,.1f} samples per epoch, rates up to {balance.max_rate:g}"
            f"{laps} ({balance.directory})"
        )

    def _through(self, laps: int) -> tuple[list[np.ndarray], list[int]]:
        """Counts of at least so many laps, and where each of them, and what follows, starts."""
        counts, starts = self._known
        if laps > len(counts):
            new = np.zeros((laps - len(counts), len(self._sizes)), np.int64)
            for shard in range(len(self._sizes)):
                for row, is_drawn in zip(new, self._by_lap(shard, range(len(counts), laps)), strict=True):
                    row[shard] = np.count_nonzero(is_drawn)
            counts, starts = [*counts, *new], [*starts, *(starts[-1] + np.cumsum(new.sum(axis=1))).tolist()]
            self._known = counts, starts
        return counts, starts

    def _by_lap(self, shard: int, laps: range) -> Iterator[np.ndarray]:
        """bool [n] for each of some laps: whether a sample comes in it."""
        first, laps_per_epoch = self._first_rows[shard], self.laps_per_epoch
        rows = np.arange(first, first + self._sizes[shard], dtype=np.uint64)
        rates = (self.balance.rates(shard).astype(np.float64) * _ONE).astype(np.uint64)
        phases = self._hash(rows, _PHASE_STREAM) * np.uint64(laps_per_epoch)
        if self._kind == "rotation":
            yield from _crossings(phases, rates, laps, laps_per_epoch)
            return
        whole, rest = rates >> np.uint64(32), rates & np.uint64(_ONE - 1)
        for lap in laps:
            epoch, own_lap = divmod(lap, laps_per_epoch)
            chances = self._hash(rows, _CHANCE_STREAM, epoch)
            copies = (whole + (chances < rest)) << np.uint64(32)
            yield from _crossings(phases, copies, range(own_lap, own_lap + 1), laps_per_epoch)

    def _hash(self, rows: np.ndarray, *stream: int) -> np.ndarray:
        """uint64 [n] below 2^32, of the seed, the set, a stream and the sample's number: SplitMix64 (Steele 2014)."""
        key = np.random.SeedSequence((*self._seed, *stream)).generate_state(1, np.uint64)
        mixed = rows * np.uint64(0x9E3779B97F4A7C15) + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)


def _crossings(phases: np.ndarray, rates: np.ndarray, laps: range, laps_per_epoch: int) -> Iterator[np.ndarray]:
    """bool [n] of each lap: whether floor(phase + lap x rate / laps_per_epoch) is another one after it.

    phases, rates: in parts of 2^-32; the phases times `laps_per_epoch`, the rates at most that
    """
    whole = np.uint64(laps_per_epoch * _ONE)
    reached = phases + np.uint64(laps.start) * rates
    before = reached // whole
    for _ in laps:
        reached += rates
        after = reached // whole
        yield after != before
        before = after
