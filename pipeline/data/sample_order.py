"""The order of samples: a pure function of (seed, epoch, position).

Shards are permuted, cut into windows of a few shards, and samples are shuffled within each window. Epochs follow each
other in one stream of positions without a gap. Nothing else knows an order: a rank or a worker asks which sample
stands at a position, so that any number of ranks and workers, before or after any restart, reads the same sequence.
The state of a training run is a number of samples.

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

import numpy as np

# Distinguishes the draws that share a seed, a set and an epoch.
_SHARD_STREAM, _WINDOW_STREAM = 0, 1


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
        self._seed = seed
        self._set_number = set_number
        self._with_replacement = with_replacement
        # bounded: a process looks at one epoch and one window, or at two where one ends
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        self._window = lru_cache(maxsize=2)(self._draw_window)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, index within the shard) of the sample at a position of the stream, from 0 up."""
        epoch, window, within = self._find(position)
        offset = int(self._window(epoch, window)[within])
        shards, starts = self._epoch(epoch).windows[window]
        number = bisect.bisect_right(starts, offset) - 1
        return shards[number], offset - starts[number]

    def windows(self, positions: range) -> Iterator[tuple[Sequence[int], np.ndarray | None]]:
        """A stretch of positions window by window: its shards, and which of their samples stand there, None for all."""
        position = positions.start
        while position < positions.stop:
            epoch, window, within = self._find(position)
            shards = self._epoch(epoch).windows[window][0]
            size = sum(self.shard_sizes[shard] for shard in shards)
            length = min(size - within, positions.stop - position)
            is_whole = length == size and not self._with_replacement  # then nothing need be drawn
            yield shards, None if is_whole else self._window(epoch, window)[within : within + length]
            position += length

    def windows_at(self, position: int) -> tuple[Sequence[int], Sequence[int]]:
        """Shards of the window at a position, and of the window after it."""
        epoch, window, _ = self._find(position)
        windows = self._epoch(epoch).windows
        following = windows[window + 1] if window + 1 < len(windows) else self._epoch(epoch + 1).windows[0]
        return windows[window][0], following[0]

    def _find(self, position: int) -> tuple[int, int, int]:
        """(epoch, window, position within the window)."""
        epoch, position = divmod(position, self.num_samples)
        starts = self._epoch(epoch).window_starts
        window = bisect.bisect_right(starts, position) - 1
        return epoch, window, position - starts[window]

    def _plan_epoch(self, epoch: int) -> _EpochPlan:
        shards = self._rng(epoch, _SHARD_STREAM).permutation(len(self.shard_sizes)).tolist()
        windows, window_starts, position = [], [], 0
        for first in range(0, len(shards), self.window_shards):
            window = shards[first : first + self.window_shards]
            sizes = [self.shard_sizes[shard] for shard in window]
            windows.append((window, list(accumulate(sizes, initial=0))[:-1]))
            window_starts.append(position)
            position += sum(sizes)
        return _EpochPlan(windows, window_starts)

    def _draw_window(self, epoch: int, window: int) -> np.ndarray:
        size = sum(self.shard_sizes[shard] for shard in self._epoch(epoch).windows[window][0])
        rng = self._rng(epoch, _WINDOW_STREAM, window)
        return rng.integers(size, size=size) if self._with_replacement else rng.permutation(size)

    def _rng(self, epoch: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, self._set_number, epoch, *stream))

    def __reduce__(self) -> tuple[type[SampleOrder], tuple[Sequence[int], int, int, int, bool]]:
        # for worker processes that are not forked: what is cached stays behind
        arguments = (self.shard_sizes, self.window_shards, self._seed, self._set_number, self._with_replacement)
        return SampleOrder, arguments


@dataclass(frozen=True)
class _EpochPlan:
    """windows: (shards, where each shard's samples start in the window); window_starts: first position of each."""

    windows: list[tuple[Sequence[int], list[int]]]
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
        self.num_samples = sum(order.num_samples for order in orders)
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
