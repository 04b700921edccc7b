"""The order of samples: a pure function of (seed, epoch, position).

Shards are permuted, cut into windows of a few shards, and samples are shuffled within each window. Epochs follow each
other in one stream of positions without a gap. Nothing else knows an order: a rank or a worker asks which sample
stands at a position, so that any number of ranks and workers, before or after any restart, reads the same sequence.
The state of a training run is a number of samples.

An epoch is a lap, in which every sample comes once; balanced_order.py has laps in which some come.

Several sets are one stream, in proportion to their weights. Of any n positions from the start, the first set gets
floor(n w / W), W being the sum of weights; what is left is a stream of its own, of which the next set gets its share
of the other sets' weights, and so on. All in integers, so that after W positions each set has had exactly its weight,
and no set is ever more than a few samples off.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

# Distinguishes the draws that share a seed, a set and an epoch.
_SHARD_STREAM, _WINDOW_STREAM = 0, 1


class Epochs(Protocol):
    """Where epochs begin in a stream of positions."""

    @property
    def num_samples(self) -> int:
        """How many an epoch has, on average."""

    def start(self, epoch: int) -> int:
        """The first position of an epoch."""

    def at(self, position: int) -> int:
        """The epoch in which a position is."""

    def samples(self, first_epoch: int, epochs: float) -> int:
        """How many come in so many epochs from one on."""


@dataclass(frozen=True)
class EqualEpochs:
    """Epochs of one size."""

    num_samples: int

    def start(self, epoch: int) -> int:
        """The first position of an epoch."""
        return epoch * self.num_samples

    def at(self, position: int) -> int:
        """The epoch in which a position is."""
        return position // self.num_samples

    def samples(self, first_epoch: int, epochs: float) -> int:
        """How many come in so many epochs."""
        return round(epochs * self.num_samples)


class SampleOrder:
    """Endless order of `sum(shard_sizes)` samples: each exactly once in each epoch.

    with_replacement: instead, as many as a window has are drawn from it at random, so that some come more than once
    set_number: sets that are read side by side are shuffled independently
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        window_shards: int,
        seed: int,
        set_number: int = 0,
        with_replacement: bool = False,
    ) -> None:
        self.shard_sizes = tuple(shard_sizes)
        self.window_shards = window_shards
        self.num_samples = sum(self.shard_sizes)
        self.epochs: Epochs = EqualEpochs(self.num_samples)
        self._seed = seed
        self._set_number = set_number
        self._with_replacement = with_replacement
        self._draws_all = not with_replacement
        # bounded: a process looks at one lap and one window, or at two where one ends
        self._lap = lru_cache(maxsize=2)(self._plan_lap)
        self._window = lru_cache(maxsize=2)(self._draw_window)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, index within the shard) of the sample at a position of the stream, from 0 up."""
        lap, window, within = self._find(position)
        offset = int(self._window(lap, window)[within])
        shards, starts = self._lap(lap).windows[window]
        number = bisect.bisect_right(starts, offset) - 1
        return shards[number], offset - starts[number]

    def windows(self, positions: range) -> Iterator[tuple[Sequence[int], np.ndarray | None]]:
        """A stretch of positions window by window: its shards, and which of their samples stand there, None for all."""
        position = positions.start
        while position < positions.stop:
            lap, window, within = self._find(position)
            plan = self._lap(lap)
            size = plan.window_starts[window + 1] - plan.window_starts[window]
            length = min(size - within, positions.stop - position)
            is_whole = length == size and self._draws_all  # then nothing need be drawn
            yield plan.windows[window][0], None if is_whole else self._window(lap, window)[within : within + length]
            position += length

    def windows_at(self, position: int) -> tuple[Sequence[int], Sequence[int]]:
        """Shards of the window at a position, and of the window after it."""
        lap, window, _ = self._find(position)
        windows = self._lap(lap).windows
        return windows[window][0], (windows[window + 1] if window + 1 < len(windows) else self._first_after(lap))[0]

    def _find(self, position: int) -> tuple[int, int, int]:
        """(lap, window, position within the window)."""
        lap, position = self._lap_at(position)
        starts = self._lap(lap).window_starts
        window = bisect.bisect_right(starts, position) - 1
        return lap, window, position - starts[window]

    def _lap_at(self, position: int) -> tuple[int, int]:
        """(lap, position within it)."""
        return divmod(position, self.num_samples)

    def _first_after(self, lap: int) -> Window:
        """The first window that comes after a lap."""
        return self._lap(lap + 1).windows[0]

    def _plan_lap(self, lap: int) -> LapPlan:
        shards = self._shuffled_shards(lap)
        windows = [shards[first : first + self.window_shards] for first in range(0, len(shards), self.window_shards)]
        return self._lay_out(windows, self.shard_sizes)

    def _shuffled_shards(self, lap: int) -> list[int]:
        shards: list[int] = self._rng(lap, _SHARD_STREAM).permutation(len(self.shard_sizes)).tolist()
        return shards

    def _lay_out(self, windows: Iterable[Sequence[int]], counts: Sequence[int]) -> LapPlan:
        """counts: how many of each shard's samples come in the lap."""
        laid_out = [(w, list(accumulate((self.shard_sizes[s] for s in w), initial=0))[:-1]) for w in windows]
        lengths = (sum(counts[shard] for shard in shards) for shards, _ in laid_out)
        return LapPlan(laid_out, list(accumulate(lengths, initial=0)))

    def _draw_window(self, lap: int, window: int) -> np.ndarray:
        size = sum(self.shard_sizes[shard] for shard in self._lap(lap).windows[window][0])
        rng = self._window_rng(lap, window)
        return rng.integers(size, size=size) if self._with_replacement else rng.permutation(size)

    def _window_rng(self, lap: int, window: int) -> np.random.Generator:
        return self._rng(lap, _WINDOW_STREAM, window)

    def _rng(self, lap: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, self._set_number, lap, *stream))

    def __reduce__(self) -> tuple[type[SampleOrder], tuple[object, ...]]:
        # for worker processes that are not forked: what is cached stays behind
        arguments = (self.shard_sizes, self.window_shards, self._seed, self._set_number, self._with_replacement)
        return SampleOrder, arguments


Window = tuple[Sequence[int], list[int]]  # shards, and where the samples of each start, were all of them in it


@dataclass(frozen=True)
class LapPlan:
    """window_starts: the first position of each window, and where the lap ends."""

    windows: list[Window]
    window_starts: list[int]


class Proportions:
    """Which set stands at a position, for sets with integer weights."""

    def __init__(self, weights: Sequence[int]) -> None:
        remaining = sum(weights)
        self._shares: list[tuple[int, int]] = []
        for weight in weights:
            self._shares.append((weight, remaining))
            remaining -= weight

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` positions each set has."""
        counts = []
        for weight, remaining in self._shares:
            counts.append(position * weight // remaining)
            position -= counts[-1]
        return counts

    def locate(self, position: int) -> tuple[int, int]:
        """(set, position in that set's own stream) of a position."""
        for number, (weight, remaining) in enumerate(self._shares):
            count = position * weight // remaining
            if (position + 1) * weight // remaining > count:
                return number, count
            position -= count
        raise AssertionError("the last set has all of what is left")


class MixedOrder:
    """The endless order of all sets' samples; shards are numbered through the sets. One set is a mixture too."""

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[int]) -> None:
        self.orders = tuple(orders)
        self.weights = tuple(weights)
        of_sets = [order.epochs for order in orders]
        self.epochs = of_sets[0] if len(orders) == 1 else EqualEpochs(sum(epochs.num_samples for epochs in of_sets))
        self.num_samples = self.epochs.num_samples
        self._proportions = Proportions(weights)
        self._first_shards = list(accumulate((len(order.shard_sizes) for order in orders), initial=0))

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, index within the shard) of the sample at a position of the stream, from 0 up."""
        number, position = self._proportions.locate(position)
        shard, index = self.orders[number].locate(position)
        return self._first_shards[number] + shard, index

    def windows_at(self, position: int) -> tuple[list[int], list[int]]:
        """Shards of all sets from which samples are drawn at a position of the stream, and those that come next."""
        now: list[int] = []
        following: list[int] = []
        counts = self._proportions.counts(position)
        for order, first_shard, own_position in zip(self.orders, self._first_shards, counts, strict=False):
            for shards, numbers in zip((now, following), order.windows_at(own_position), strict=True):
                shards.extend(first_shard + number for number in numbers)
        return now, following

    def most_of_set(self, num_positions: int, weight: int) -> int:
        """So many of as many positions in a row, at most, can be of a set with this weight."""
        # a prefix of the stream is fewer samples off than there are sets, and a stretch is the difference of two
        fair_share = -(-num_positions * weight // sum(self.weights))
        return min(num_positions, fair_share + 2 * (len(self.orders) - 1))

    def by_set(self, positions: range) -> list[range]:
        """Which positions of each set's own stream stand at a stretch of positions."""
        starts, stops = self._proportions.counts(positions.start), self._proportions.counts(positions.stop)
        return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]

    def samples_by_set(self, stretches: Iterable[range]) -> list[int]:
        """How many samples of each set stand at some stretches of positions."""
        by_stretch = [[len(own) for own in self.by_set(positions)] for positions in stretches]
        return [sum(lengths) for lengths in zip(*by_stretch, strict=True)]


@dataclass(frozen=True)
class BatchPlan:
    """Which positions of the stream each rank reads at each micro-batch: contiguous slices, equal on all ranks.

    num_samples: of an epoch
    first_step, first_position: the step of the run with which this plan begins, and where the stream stands then
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    first_step: int = 0
    first_position: int = 0

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a rank per optimiser step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps per epoch; a step may take the last samples of one and the first of the next."""
        return self.num_samples / self.global_batch_size

    def position(self, step: int) -> int:
        """Where the stream stands before a step; steps count from 0 over the whole run."""
        return self.first_position + (step - self.first_step) * self.global_batch_size

    def micro_batch(self, step: int, accumulation: int, rank: int) -> range:
        """Positions of one micro-batch."""
        first = self.position(step) + (accumulation * self.world_size + rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
