"""The order of samples: a pure function of (seed, epoch, position).

Shards are permuted, cut into windows of a few shards, and samples are shuffled within each window. Nothing else knows
an order: a rank or a worker asks which sample stands at a position, so that any number of ranks and workers, before or
after any restart, reads the same sequence. The state of a training run is its step number.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

# Distinguishes the draws that share a seed and an epoch.
_SHARD_STREAM, _WINDOW_STREAM = 0, 1


@dataclass(frozen=True)
class SampleOrder:
    """Order of `sum(shard_sizes)` samples in each epoch, without replacement: each exactly once."""

    shard_sizes: tuple[int, ...]
    window_shards: int
    seed: int

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.shard_sizes)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, index within the shard) of the sample at `position` of `epoch`; 0 <= position < num_samples."""
        plan = _epoch_plan(self, epoch)
        window = bisect.bisect_right(plan.window_starts, position) - 1
        offset = int(_window_permutation(self, epoch, window)[position - plan.window_starts[window]])
        shards, starts = plan.windows[window]
        within = bisect.bisect_right(starts, offset) - 1
        return shards[within], offset - starts[within]


@dataclass(frozen=True)
class _EpochPlan:
    """windows: (shards, where each shard's samples start in the window); window_starts: first position of each."""

    windows: list[tuple[Sequence[int], list[int]]]
    window_starts: list[int]


# Bounded: a training process looks at one epoch, or at two where one ends.
@lru_cache(maxsize=4)
def _epoch_plan(order: SampleOrder, epoch: int) -> _EpochPlan:
    rng = np.random.default_rng((order.seed, epoch, _SHARD_STREAM))
    shards = rng.permutation(len(order.shard_sizes)).tolist()
    windows, window_starts, position = [], [], 0
    for first in range(0, len(shards), order.window_shards):
        window = shards[first : first + order.window_shards]
        sizes = [order.shard_sizes[shard] for shard in window]
        windows.append((window, list(accumulate(sizes, initial=0))[:-1]))
        window_starts.append(position)
        position += sum(sizes)
    return _EpochPlan(windows, window_starts)


@lru_cache(maxsize=4)
def _window_permutation(order: SampleOrder, epoch: int, window: int) -> np.ndarray:
    size = sum(order.shard_sizes[shard] for shard in _epoch_plan(order, epoch).windows[window][0])
    return np.random.default_rng((order.seed, epoch, _WINDOW_STREAM, window)).permutation(size)


@dataclass(frozen=True)
class BatchPlan:
    """Which positions each rank reads at each micro-batch: contiguous slices of the epoch, equal on all ranks.

    What does not fill a global batch at the end of an epoch is left out of that epoch; the shuffle makes it other
    samples each time. `first_step` and `first_epoch`: where in the run this plan takes over from another one.
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    first_step: int = 0
    first_epoch: int = 0

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a rank per optimiser step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return self.num_samples // self.global_batch_size

    def micro_batch(self, step: int, accumulation: int, rank: int) -> tuple[int, range]:
        """(epoch, positions) of one micro-batch; `step` counts from 0 over the whole run."""
        epochs, step_in_epoch = divmod(step - self.first_step, self.steps_per_epoch)
        first = step_in_epoch * self.global_batch_size
        first += (accumulation * self.world_size + rank) * self.micro_batch_size
        return self.first_epoch + epochs, range(first, first + self.micro_batch_size)
