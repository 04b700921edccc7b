"""Which samples a run has seen: counted by going through the order again, not taken from what it should be.

A window that was read to its end holds each of its samples once, unless they are drawn with replacement: so whole
shards are counted by their sizes, and only where a stretch begins or ends are samples looked at. Nothing is kept from
one count to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from pipeline.data.sample_order import MixedOrder, SampleOrder
from pipeline.data.training_data import TrainingData


@dataclass(frozen=True)
class Coverage:
    """Of the samples of a set: how often one was seen, how many different ones."""

    samples: int
    seen: int
    unique: int

    @property
    def repeated(self) -> int:
        """How often a sample was seen that had been seen before."""
        return self.seen - self.unique

    def __str__(self) -> str:
        return f"{self.seen:,} seen, {self.unique:,} of {self.samples:,} unique, {self.repeated:,} repeated"


def describe_coverage(what: str, data: TrainingData, order: MixedOrder, stretches: Sequence[range]) -> str:
    """A line on what reading some stretches of positions covers, and one for each set of a mixture."""
    of_sets = cover(order, stretches)
    whole = Coverage(*(sum(values) for values in zip(*map(astuple, of_sets), strict=True)))
    lines = [f"coverage of {what}: {whole}"]
    if len(of_sets) > 1:
        lines += [f"  {name}: {coverage}" for name, coverage in zip(data.names, of_sets, strict=True)]
    return "\n".join(lines)


def cover(order: MixedOrder, stretches: Sequence[range]) -> list[Coverage]:
    """What reading some stretches of positions covers of each set; O(shards), with replacement O(samples)."""
    own_stretches = zip(*(order.by_set(positions) for positions in stretches), strict=True)
    return [
        Coverage(own.num_samples, sum(map(len, positions)), _count_unique(own, positions))
        for own, positions in zip(order.orders, own_stretches, strict=True)
    ]


def _count_unique(order: SampleOrder, stretches: Iterable[range]) -> int:
    """Shards that were seen whole, in any epoch, are not looked into; of others each sample has a bit."""
    whole: set[int] = set()
    seen: dict[int, np.ndarray] = {}
    for positions in stretches:
        for shards, drawn in order.windows(positions):
            if drawn is None:
                whole.update(shards)
                continue
            ends = np.cumsum([order.shard_sizes[shard] for shard in shards])
            read = np.zeros(ends[-1], dtype=bool)
            read[drawn] = True
            for shard, new in zip(shards, np.split(read, ends[:-1]), strict=True):
                bits = np.packbits(new)
                seen[shard] = seen[shard] | bits if shard in seen else bits
            if len(whole) == len(order.shard_sizes):
                return order.num_samples
    in_whole = sum(order.shard_sizes[shard] for shard in whole)
    return in_whole + sum(int(np.unpackbits(bits).sum()) for shard, bits in seen.items() if shard not in whole)
