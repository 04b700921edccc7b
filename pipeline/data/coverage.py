"""Which samples a run has seen: counted by going through the order again, not taken from what it should be.

A window that was read to its end holds each of its samples once, unless they are drawn with replacement or by a
balance: so whole shards are counted by their sizes, and only where a stretch begins or ends are samples looked at.
Nothing is kept from one count to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from formats.balance import Balance
from pipeline.data.balanced_order import BalancedOrder
from pipeline.data.sample_order import MixedOrder, SampleOrder
from pipeline.data.training_data import TrainingData


@dataclass(frozen=True)
class Third:
    """Of the samples with rates up to `max_rate` and above the third before: how often one was drawn, how many seen."""

    max_rate: float
    samples: int
    drawn: int
    seen: int


@dataclass(frozen=True)
class Coverage:
    """Of the samples of a set: how often one was seen, how many different ones.

    thirds: of a balanced set, by rate: head, which is thinned most, middle and tail
    """

    samples: int
    seen: int
    unique: int
    thirds: tuple[Third, ...] = ()

    @property
    def repeated(self) -> int:
        """How often a sample was seen that had been seen before."""
        return self.seen - self.unique

    def __str__(self) -> str:
        return f"{self.seen:,} seen, {self.unique:,} of {self.samples:,} unique, {self.repeated:,} repeated"

    def describe_thirds(self) -> str:
        """Head, middle and tail in words."""
        return "; ".join(
            f"{name} (rates up to {third.max_rate:.3g}) {third.drawn:,} drawn, {third.seen:,} of {third.samples:,} seen"
            for name, third in zip(("head", "middle", "tail"), self.thirds, strict=True)
        )


def describe_coverage(what: str, data: TrainingData, order: MixedOrder, stretches: Sequence[range]) -> str:
    """A line on what reading some stretches of positions covers, and one for each set of a mixture."""
    return describe_reads(what, data, [(order, positions) for positions in stretches])


def describe_reads(what: str, data: TrainingData, reads: Sequence[tuple[MixedOrder, range]]) -> str:
    """The same of stretches that are read in orders of their own, as stages with other balances do."""
    of_sets = cover_reads(reads)
    whole = Coverage(sum(c.samples for c in of_sets), sum(c.seen for c in of_sets), sum(c.unique for c in of_sets))
    lines = [f"coverage of {what}: {whole}"]
    for name, coverage in zip(data.names, of_sets, strict=True):
        if len(of_sets) > 1:
            lines.append(f"  {name}: {coverage}")
        if coverage.thirds:
            lines.append(f"  {coverage.describe_thirds()}")
    return "\n".join(lines)


def cover(order: MixedOrder, stretches: Sequence[range]) -> list[Coverage]:
    """What reading some stretches of positions covers of each set; O(shards), where samples are drawn O(samples)."""
    return cover_reads([(order, positions) for positions in stretches])


def cover_reads(reads: Sequence[tuple[MixedOrder, range]]) -> list[Coverage]:
    """The same of stretches that are read in orders of their own; thirds are those of the last one's balance."""
    by_read = [list(zip(order.orders, order.by_set(positions), strict=True)) for order, positions in reads]
    return [_cover_set(own_reads) for own_reads in zip(*by_read, strict=True)]


def _cover_set(reads: Sequence[tuple[SampleOrder, range]]) -> Coverage:
    """Shards that were seen whole, in any epoch, are not looked into; of others each sample has a bit."""
    order = reads[-1][0]
    sizes = order.shard_sizes
    thirds = _Thirds(order.draws.balance) if isinstance(order, BalancedOrder) else None
    whole: set[int] = set()
    seen: dict[int, np.ndarray] = {}
    for own, positions in reads:
        for shards, drawn in own.windows(positions):
            if drawn is None and not thirds:
                whole.update(shards)
                continue
            for shard, samples in _by_shard(shards, sizes, drawn):
                read = np.zeros(sizes[shard], dtype=bool)
                read[samples] = True
                bits = np.packbits(read)
                seen[shard] = seen[shard] | bits if shard in seen else bits
                if thirds:
                    thirds.add_drawn(shard, samples)
            if len(whole) == len(sizes):
                break
    unique = sum(sizes[shard] for shard in whole)
    unique += sum(int(np.unpackbits(bits).sum()) for shard, bits in seen.items() if shard not in whole)
    num_drawn = sum(len(positions) for _, positions in reads)
    return Coverage(order.num_samples, num_drawn, unique, thirds.count(seen) if thirds else ())


def _by_shard(
    shards: Sequence[int], sizes: Sequence[int], drawn: np.ndarray | None
) -> Iterator[tuple[int, np.ndarray | slice]]:
    """Which samples of each shard of a window were drawn; None for all."""
    start = 0
    for shard in shards:
        if drawn is None:
            yield shard, slice(None)
        else:
            yield shard, drawn[(drawn >= start) & (drawn < start + sizes[shard])] - start
        start += sizes[shard]


class _Thirds:
    """Counts by thirds of a balance's rates."""

    def __init__(self, balance: Balance) -> None:
        self._balance = balance
        self._ends = balance.thirds
        self._drawn = np.zeros(3, np.int64)

    def add_drawn(self, shard: int, samples: np.ndarray | slice) -> None:
        """Note that samples of a shard were drawn."""
        self._drawn += np.bincount(self._third_of(shard)[samples], minlength=3)

    def count(self, seen: Mapping[int, np.ndarray]) -> tuple[Third, ...]:
        """seen: of shards of which any sample was seen, a bit for each sample."""
        sizes, of_seen = np.zeros(3, np.int64), np.zeros(3, np.int64)
        for number, shard in enumerate(self._balance.shards):
            thirds = self._third_of(number)
            sizes += np.bincount(thirds, minlength=3)
            if number in seen:
                is_seen = np.unpackbits(seen[number], count=shard.samples).astype(bool)
                of_seen += np.bincount(thirds[is_seen], minlength=3)
        up_to = (*self._ends, self._balance.max_rate)
        counts = (sizes.tolist(), self._drawn.tolist(), of_seen.tolist())
        return tuple(Third(*values) for values in zip(up_to, *counts, strict=True))

    def _third_of(self, shard: int) -> np.ndarray:
        rates = self._balance.rates(shard)
        first, second = self._ends
        return (rates > first).astype(np.int64) + (rates > second)
