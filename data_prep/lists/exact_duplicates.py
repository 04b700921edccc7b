"""Exact duplicates among any number of rows, in bounded memory.

A row is known by 128 bits of SHA-256 of its key: among 10^10 rows the chance that two different keys collide is below
10^-18. Every part of a list stores its digests sorted. Parts are compared range by range of digests, as many ranges as
memory asks for, so that all equal digests meet; of equal ones the first in the order of the list stays.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4")])
BUCKETS = 1024  # finest division of the digests, by their first bits
RECORDS_PER_PASS = 4_000_000  # 80 MB, about 250 MB while they are sorted

Records = npt.NDArray[np.void]
Mask = npt.NDArray[np.bool_]
Digests = npt.NDArray[np.uint64]  # [rows, 2]
OpenPart = Callable[[int], BinaryIO]  # part number -> its records, seekable


def digests(texts: pa.ChunkedArray) -> Digests:
    """The first 128 bits of SHA-256 of each text."""
    sha256 = hashlib.sha256
    joined = b"".join([sha256(text).digest() for text in texts.cast(pa.binary()).to_pylist()])
    return np.ascontiguousarray(np.frombuffer(joined, np.uint64).reshape(-1, 4)[:, :2])


def pair_digests(table: pa.Table) -> Digests:
    """[n, 2] digests of url, a line feed and caption: what uids are made of."""
    return digests(pc.binary_join_element_wise(table["url"], table["caption"], "\n"))


KEYS: Mapping[str, Callable[[pa.Table], Digests]] = {
    "url": lambda table: digests(table["url"]),
    "caption": lambda table: digests(table["caption"]),
    "pair": pair_digests,
}


def sorted_records(digests_N2: Digests) -> tuple[Records, list[int]]:
    """A part's records, sorted by digest, and for each bucket where it begins (and the end)."""
    records = np.empty(len(digests_N2), RECORD)
    order = np.argsort(digests_N2[:, 0], kind="stable")
    records["high"], records["low"] = digests_N2[order, 0], digests_N2[order, 1]
    records["row"] = order
    first_bits = np.arange(BUCKETS, dtype=np.uint64) * np.uint64(2**64 // BUCKETS)
    return records, [*np.searchsorted(records["high"], first_bits).tolist(), len(records)]


class DuplicateMask:
    """Which rows of all parts are duplicates: one byte a row, in an unnamed file that the kernel may page out."""

    def __init__(self, part_rows: Sequence[int]) -> None:
        self._starts = np.concatenate([[0], np.cumsum(part_rows, dtype=np.int64)])
        with tempfile.TemporaryFile() as stream:
            stream.truncate(max(int(self._starts[-1]), 1))
            self._mask = np.memmap(stream, np.bool_, "r+")

    def part(self, number: int) -> Mask:
        """The rows of one part: True is a duplicate."""
        return self._mask[self._starts[number] : self._starts[number + 1]]

    def marked(self) -> int:
        """How many rows are marked."""
        return int(np.count_nonzero(self._mask))

    def mark(self, part_buckets: Sequence[Sequence[int]], open_part: OpenPart) -> None:
        """Mark every row whose digest an earlier row has, leaving out of account the rows that are marked already."""
        if not part_buckets:
            return
        sizes = np.diff(np.array(part_buckets, np.int64).reshape(-1, BUCKETS + 1), axis=1).sum(axis=0)
        for first, last in _passes(sizes):
            loaded = [
                (number, self._load(open_part, number, buckets[first], buckets[last]))
                for number, buckets in enumerate(part_buckets)
            ]
            self._mark_pass(loaded)

    def _load(self, open_part: OpenPart, number: int, start: int, stop: int) -> Records:
        with open_part(number) as stream:
            stream.seek(start * RECORD.itemsize)
            records: Records = np.frombuffer(stream.read((stop - start) * RECORD.itemsize), RECORD)
        kept: Records = records[~self.part(number)[records["row"]]]
        return kept

    def _mark_pass(self, loaded: Sequence[tuple[int, Records]]) -> None:
        high = np.concatenate([records["high"] for _, records in loaded])
        low = np.concatenate([records["low"] for _, records in loaded])
        rows = np.concatenate([self._starts[number] + records["row"] for number, records in loaded])
        # stable: where digests are equal, the rows already stand in the order of the list
        order = np.argsort(high, kind="stable")
        same_high = high[order[1:]] == high[order[:-1]]
        same = same_high & (low[order[1:]] == low[order[:-1]])
        if np.any(same_high & ~same):  # 64 bits collide: equal digests need not be neighbours
            order = np.lexsort((low, high))
            same = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
        self._mask[rows[order[1:][same]]] = True


def _passes(bucket_sizes: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges of buckets of at most about `RECORDS_PER_PASS` records together."""
    passes: list[tuple[int, int]] = []
    first = records = 0
    for bucket, size in enumerate(bucket_sizes.tolist()):
        if records and records + size > RECORDS_PER_PASS:
            passes.append((first, bucket))
            first, records = bucket, 0
        records += size
    passes.append((first, BUCKETS))
    return passes
