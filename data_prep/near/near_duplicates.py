"""Which of many 64-bit hashes differ in few bits from an earlier one, without comparing all with all.

The bits are cut into `max_distance` + 2 bands. Two hashes within the distance agree in at least two whole bands, so for
every pair of bands the hashes are sorted by these two, and only those that agree there are compared (G. S. Manku,
A. Jain, A. Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007). Everything is done in parts that fit
the memory.

N hashes in the order of their samples, P pairs
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.console import progress_bar
from data_prep.near.perceptual_hash import BITS, distances

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_CHUNK = 1 << 20
_BYTES_PER_HASH = 64  # in memory: the hash, its place, the sorted copies, what is compared
_BYTES_PER_PAIR = 256  # as Python's integers
_NONE = -1
_MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads what was masked over all bits (2**64 / golden ratio)


def nearest_kept(
    hashes_N: Hashes, fixed: int, max_distance: int, folder: Path, memory_bytes: int
) -> tuple[Places, npt.NDArray[np.uint8]]:
    """Decide in order: a hash is kept unless a kept one before it differs in at most `max_distance` bits.

    The first `fixed` hashes are kept whatever they are like. Returns, for each hash, the place of the first kept one
    that equals it or else is near to it, or -1 if it is kept itself, and their distance; both are files in `folder`,
    mapped into memory.
    """
    count = len(hashes_N)
    first_N = _first_equal(hashes_N, _new_file(folder / "first.npy", count, np.int64), memory_bytes)
    partner_N = _new_file(folder / "partner.npy", count, np.int64)
    distance_N = _new_file(folder / "distance.npy", count, np.uint8)
    partner_N[:] = _NONE
    pairs = _write_pairs(hashes_N, first_N, fixed, max_distance, folder, memory_bytes)
    _decide(pairs, partner_N, distance_N, count, memory_bytes)
    for chunk in _chunks(count):
        # an equal hash shares the fate of the first of its kind
        place = np.arange(chunk.start, min(chunk.stop, count))
        first = first_N[chunk]
        repeats = (first != place) & (place >= fixed)
        inherited = partner_N[first]
        distance_N[chunk] = np.where(repeats & (inherited != _NONE), distance_N[first], distance_N[chunk])
        partner_N[chunk] = np.where(repeats, np.where(inherited == _NONE, first, inherited), partner_N[chunk])
    return partner_N, distance_N


def _first_equal(hashes_N: Hashes, first_N: Places, memory_bytes: int) -> Places:
    """Fill in, for each hash, the place of the first that equals it."""
    for places in _partitions(hashes_N, ~np.uint64(0), memory_bytes):
        _, first, inverse = np.unique(hashes_N[places], return_index=True, return_inverse=True)
        first_N[places] = places[first[inverse]]
    return first_N


def _write_pairs(
    hashes_N: Hashes, first_N: Places, fixed: int, max_distance: int, folder: Path, memory_bytes: int
) -> Path:
    """Write all pairs of distinct hashes within the distance as (later, earlier, distance); some occur repeatedly."""
    path = folder / "pairs.bin"
    tables = list(_masks(max_distance))
    with path.open("wb") as stream, progress_bar("compare", len(tables), "table") as progress:
        for mask in tables:
            for places in _partitions(hashes_N, mask, memory_bytes):
                distinct = places[first_N[places] == places]
                for one, other, distance in _near_in_table(hashes_N[distinct], mask, max_distance):
                    ends = np.sort(np.stack([distinct[one], distinct[other]]), axis=0)
                    rows = np.stack([ends[1], ends[0], distance.astype(np.int64)], 1)
                    stream.write(rows[rows[:, 0] >= fixed].tobytes())
            progress.update()
    return path


def _masks(max_distance: int) -> Iterator[np.uint64]:
    """The bits of each two of the bands."""
    edges = [band * BITS // (max_distance + 2) for band in range(max_distance + 3)]
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    for one, other in itertools.combinations(bands, 2):
        yield np.uint64(one | other)


def _near_in_table(
    hashes_M: Hashes, mask: np.uint64, max_distance: int
) -> Iterator[tuple[Places, Places, npt.NDArray[np.uint8]]]:
    """Index pairs of hashes that agree in the masked bits and differ in at most `max_distance` bits."""
    keys_M = hashes_M & mask
    order_M = np.argsort(keys_M, kind="stable")
    keys_M, hashes_M = keys_M[order_M], hashes_M[order_M]
    # each is compared with the next, then with the one after it, as long as they agree
    start_P = np.arange(max(len(keys_M) - 1, 0))
    for step in itertools.count(1):
        start_P = start_P[: np.searchsorted(start_P, len(keys_M) - step)]
        start_P = start_P[keys_M[start_P] == keys_M[start_P + step]]
        if not len(start_P):
            return
        distance_P = distances(hashes_M[start_P], hashes_M[start_P + step])
        near_P = distance_P <= max_distance
        yield order_M[start_P[near_P]], order_M[start_P[near_P] + step], distance_P[near_P]


def _decide(pairs: Path, partner_N: Places, distance_N: npt.NDArray[np.uint8], count: int, memory_bytes: int) -> None:
    """Go through the later ends of the pairs in order."""
    if not pairs.stat().st_size:
        return
    rows_P3 = np.memmap(pairs, np.int64, "r").reshape(-1, 3)
    parts = 1 + _BYTES_PER_PAIR * len(rows_P3) // memory_bytes
    edges = [count * part // parts for part in range(parts + 1)]
    for low, high in itertools.pairwise(edges):
        parts_P3 = (rows_P3[chunk] for chunk in _chunks(len(rows_P3)))
        part_P3 = np.concatenate([rows[(low <= rows[:, 0]) & (rows[:, 0] < high)] for rows in parts_P3])
        for later, earlier, distance in part_P3[np.lexsort((part_P3[:, 1], part_P3[:, 0]))].tolist():
            if partner_N[later] == _NONE and partner_N[earlier] == _NONE:
                partner_N[later], distance_N[later] = earlier, distance


def _partitions(hashes_N: Hashes, mask: np.uint64, memory_bytes: int) -> Iterator[Places]:
    """The places of the hashes, in parts that fit the memory; those that agree under the mask are in one part."""
    parts = 1 + _BYTES_PER_HASH * len(hashes_N) // memory_bytes
    for part in range(parts):
        chosen = []
        for chunk in _chunks(len(hashes_N)):
            mixed_C = ((hashes_N[chunk] & mask) * _MIX) >> np.uint64(32)
            chosen.append(chunk.start + np.flatnonzero(mixed_C % np.uint64(parts) == part))
        yield np.concatenate(chosen)


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, start + _CHUNK)


def _new_file(path: Path, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(count,))
