"""Several sets of samples in one stream, in proportion to their weights: a pure function of the position.

Of any n positions from the start, the first set gets floor(n w / W), W being the sum of weights; what is left is a
stream of its own, of which the next set gets its share of the other sets' weights, and so on. All in integers, so that
after W positions each set has had exactly its weight, and no set is ever more than a few samples off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from pipeline.data.sample_order import SampleOrder


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
