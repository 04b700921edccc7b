"""Counting the words of captions, however many distinct ones there are."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import math
import tempfile
from collections import Counter
from collections.abc import Container, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import reading
from formats.clusters import NO_CLUSTER, Clusters, read_clusters
from formats.errors import UserError
from formats.files import make_folder, write_json
from formats.manifest import Manifest, Shard, read_manifest, usable_samples
from formats.word_counts import FORMAT_VERSION, WORD

MOST_IN_MEMORY = 5_000_000  # distinct words; about half a GB
_LOG_UNITS = 1000  # to a doubling of a size: sums of logarithms are whole numbers, as counts are
_SUMS = ("counts", "placed", "sizes")


def words_of(caption: str) -> list[str]:
    """The lower-cased maximal runs of letters, digits and inner apostrophes."""
    return WORD.findall(caption.lower())


class WordCounts:
    """Counts of words, added up piece by piece; beyond `most_in_memory` words they go to sorted files in `folder`."""

    def __init__(self, folder: Path, most_in_memory: int = MOST_IN_MEMORY) -> None:
        self._folder = folder
        self._most = most_in_memory
        self._counts = Counter[str]()
        self._files: list[Path] = []

    def add(self, counts: Counter[str]) -> None:
        """Add counts of words."""
        self._counts.update(counts)
        if len(self._counts) > self._most:
            path = self._folder / f"words-{len(self._files)}"
            with path.open("w", encoding="utf-8") as stream:
                stream.writelines(f"{word}\t{count}\n" for word, count in sorted(self._counts.items()))
            self._files.append(path)
            self._counts.clear()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Each word with its count, in the order of the words."""
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(path.open(encoding="utf-8")) for path in self._files]
            pieces = [(_parse(line) for line in stream) for stream in streams]
            merged = heapq.merge(*pieces, sorted(self._counts.items()), key=itemgetter(0))
            for word, entries in groupby(merged, key=itemgetter(0)):
                yield word, sum(count for _, count in entries)


def _parse(line: str) -> tuple[str, int]:
    word, _, count = line.rstrip("\n").partition("\t")
    return word, int(count)


def count_words(
    directory: Path, output: Path, min_count: int, processes: int, clusters_folder: Path | None = None
) -> int:
    """Write the counts of the words in the usable captions of a verified directory; returns how many words are listed.

    The file is formats.word_counts', counts descending, with the words seen at least `min_count` times; `words` is the
    number of all words, the rare ones included. With clusters it has the sizes of those that words occur in.

    Raises UserError for clusters of other shards.
    """
    captions, total, frequent = 0, 0, list[tuple[int, str]]()
    with reading(directory), tempfile.TemporaryDirectory(prefix=".words.", dir=make_folder(output.parent)) as scratch:
        counts, placed, sizes = (WordCounts(make_folder(Path(scratch) / name)) for name in _SUMS)
        manifest = read_manifest(directory)
        clusters = None if clusters_folder is None else _clusters_of(clusters_folder, manifest)
        with progress_bar("count words", len(manifest.shards), "shard") as progress:
            count_shard = functools.partial(_count_shard, directory, clusters)
            for found in map_in_processes(count_shard, manifest.shards, processes, limit=len(manifest.shards)):
                counts.add(found.counts)
                placed.add(found.placed)
                sizes.add(found.log_sizes)
                captions += found.captions
                progress.update()
        for word, count in counts:
            total += count
            if count >= min_count:
                frequent.append((-count, word))
        frequent.sort()
        listed = {word: -negative for negative, word in frequent}
        mean_sizes = _mean_sizes(listed, placed, sizes)
    fields = {"format_version": FORMAT_VERSION, "captions": captions, "words": total, "counts": listed}
    write_json(output, fields | ({"cluster_sizes": mean_sizes} if clusters else {}))
    print(f"{output}: {len(listed):,} words seen at least {min_count} times, of {total:,} in {captions:,} captions")
    return len(listed)


@dataclasses.dataclass
class _ShardWords:
    """Words of a shard's captions.

    placed: how often each occurs in a sample that is in a cluster; log_sizes: sums of logarithms of that one's size
    """

    captions: int = 0
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    placed: Counter[str] = dataclasses.field(default_factory=Counter)
    log_sizes: Counter[str] = dataclasses.field(default_factory=Counter)


def _count_shard(directory: Path, clusters: Clusters | None, line: Shard) -> _ShardWords:
    found = _ShardWords()
    cluster_n = None if clusters is None else clusters.of(line)
    for row, sample in enumerate(usable_samples(directory, line, frozenset({"txt"}))):
        words = Counter(words_of(sample.members["txt"].decode("utf-8", "replace")))
        found.counts.update(words)
        found.captions += 1
        if clusters is not None and cluster_n is not None and cluster_n[row] != NO_CLUSTER:
            log_size = round(_LOG_UNITS * math.log2(clusters.sizes_C[cluster_n[row]]))
            found.placed.update(words)
            found.log_sizes.update({word: count * log_size for word, count in words.items()})
    return found


def _clusters_of(folder: Path, manifest: Manifest) -> Clusters:
    clusters = read_clusters(folder)
    if clusters.manifest.sha256 != manifest.sha256:
        raise UserError(f"{folder} has clusters of other shards than {manifest.directory}: name those of these shards")
    return clusters


def _mean_sizes(listed: Container[str], placed: WordCounts, log_sizes: WordCounts) -> dict[str, float]:
    """Of listed words the geometric mean of the sizes of the clusters that they occur in."""
    count_of = {word: count for word, count in placed if word in listed}
    sums = ((word, log_size) for word, log_size in log_sizes if word in count_of)
    return {word: round(2 ** (log_size / _LOG_UNITS / count_of[word]), 2) for word, log_size in sums}
