"""Which part of the work is whose: slices of an array of jobs, and the ranks of each."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from pipeline.ranks import Ranks


@dataclass(frozen=True)
class Slice:
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> Slice:
        """Read "i/n"; raises argparse.ArgumentTypeError for anything else."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise argparse.ArgumentTypeError(f"{text!r} is no slice: give i/n with 0 <= i < n, e.g. 0/4")
        return Slice(int(index), int(count))

    def share(self, total: int, ranks: Ranks) -> range:
        """This slice's and rank's share of `total` things: contiguous, sizes differ by one at most within a slice."""
        first, end = total * self.index // self.count, total * (self.index + 1) // self.count
        size = end - first
        return range(first + size * ranks.rank // ranks.world_size, first + size * (ranks.rank + 1) // ranks.world_size)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
