"""Counts of n-grams and of pairs of concepts, by captions that hold them: a file for each shard, then all together.

C concepts, P pairs of a shard
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.shards.words import MOST_IN_MEMORY, WordCounts
from formats.arrays import map_array, write_array
from formats.concepts import MOST_WORDS, Concepts, Occurrence
from formats.errors import UserError
from formats.files import write_atomically
from formats.manifest import Shard, usable_samples
from formats.word_counts import WORD

# Words between two concepts that are together in a caption: what stands nearer is often grammar (`in` the `air`).
WORDS_BETWEEN = 2
# Pairs that are added up at a time.
_DENSE_PAIRS = 1 << 24


def captions_of(directory: Path, shard: Shard) -> Iterator[list[str]]:
    """The lower-cased words of each usable caption."""
    for sample in usable_samples(directory, shard, frozenset({"txt"})):
        yield WORD.findall(sample.members["txt"].decode("utf-8", "replace").lower())


def ngrams_of(words: Sequence[str]) -> set[str]:
    """All runs of one to MOST_WORDS words."""
    ends = range(1, len(words) + 1)
    return {" ".join(words[first:end]) for end in ends for first in range(max(0, end - MOST_WORDS), end)}


def count_ngrams(directory: Path, file: Path, shard: Shard) -> None:
    """Write how many captions of a shard hold each n-gram: the number of captions, then `n-gram TAB count`, sorted."""
    counts, captions = Counter[str](), 0
    for words in captions_of(directory, shard):
        counts.update(ngrams_of(words))
        captions += 1
    lines = [str(captions), *(f"{ngram}\t{count}" for ngram, count in sorted(counts.items()))]
    write_atomically(file, "\n".join(lines) + "\n")


def add_ngrams(
    files: Iterable[Path], min_count: int, scratch: Path, most_in_memory: int = MOST_IN_MEMORY
) -> tuple[int, dict[str, int]]:
    """(captions, those n-grams that at least `min_count` of them hold), of all shards; what is too much for memory is
    sorted in `scratch`.
    """
    captions, counts = 0, WordCounts(scratch, most_in_memory)
    for file in files:
        with file.open(encoding="utf-8") as lines:
            captions += int(next(lines))
            counts.add(Counter({ngram: int(count) for ngram, _, count in (line.partition("\t") for line in lines)}))
    return captions, {ngram: count for ngram, count in counts if count >= min_count}


def are_apart(first: Sequence[Occurrence], second: Sequence[Occurrence]) -> bool:
    """Whether a caption holds two concepts with other words between them; one within the other is not apart."""
    return any(a.last + WORDS_BETWEEN <= b.first or b.last + WORDS_BETWEEN <= a.first for a in first for b in second)


def count_pairs(directory: Path, concepts: Concepts, file: Path, shard: Shard) -> None:
    """Write how many captions of a shard hold two concepts: int64 [2, P]: i * C + j for i < j, ascending; counts."""
    size, pairs = len(concepts.concepts), Counter[int]()
    for words in captions_of(directory, shard):
        found: dict[int, list[Occurrence]] = {}
        for occurrence in concepts.occurrences(words):
            found.setdefault(occurrence.number, []).append(occurrence)
        pairs.update(i * size + j for i, j in combinations(sorted(found), 2) if are_apart(found[i], found[j]))
    ordered = sorted(pairs.items())
    write_array(file, np.array(ordered, np.int64).reshape(-1, 2).T.copy())


def add_pairs(files: Sequence[Path], size: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(first concept, int64 [rows, C] of how often each of the next few concepts is with every later one)."""
    rows = max(1, _DENSE_PAIRS // size)
    for first in range(0, size, rows):
        last = min(first + rows, size)
        together = np.zeros((last - first) * size, np.int64)
        for file in files:
            pairs_2P = map_array(file)
            if pairs_2P.dtype != np.int64 or pairs_2P.ndim != 2 or len(pairs_2P) != 2:
                raise UserError(f"{file} does not hold pairs of concepts: delete it and run the same again")
            begin, end = np.searchsorted(pairs_2P[0], [first * size, last * size])
            together[pairs_2P[0, begin:end] - first * size] += pairs_2P[1, begin:end]  # each pair once in a file
        yield first, together.reshape(-1, size)
