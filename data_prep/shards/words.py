"""Counting the words of captions, however many distinct ones there are."""

from __future__ import annotations

import contextlib
import functools
import heapq
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import reading
from formats.files import make_folder, write_json
from formats.manifest import Shard, read_manifest, usable_samples
from formats.word_counts import FORMAT_VERSION, WORD

MOST_IN_MEMORY = 5_000_000  # distinct words; about half a GB


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


def count_words(directory: Path, output: Path, min_count: int, processes: int) -> int:
    """Write the counts of the words in the usable captions of a verified directory; returns how many words are listed.

    The file is `{"format_version", "captions", "words", "counts": {word: count}}`, counts descending, with the words
    seen at least `min_count` times; `words` is the number of all words, the rare ones included.
    """
    captions, total, frequent = 0, 0, list[tuple[int, str]]()
    with reading(directory), tempfile.TemporaryDirectory(prefix=".words.", dir=make_folder(output.parent)) as scratch:
        counts = WordCounts(Path(scratch))
        lines = read_manifest(directory).shards
        with progress_bar("count words", len(lines), "shard") as progress:
            count_shard = functools.partial(_count_shard, directory)
            for of_shard, captions_of_shard in map_in_processes(count_shard, lines, processes, limit=len(lines)):
                counts.add(of_shard)
                captions += captions_of_shard
                progress.update()
        for word, count in counts:
            total += count
            if count >= min_count:
                frequent.append((-count, word))
    frequent.sort()
    listed = {word: -negative for negative, word in frequent}
    fields = {"format_version": FORMAT_VERSION, "captions": captions, "words": total, "counts": listed}
    write_json(output, fields)
    print(f"{output}: {len(listed):,} words seen at least {min_count} times, of {total:,} in {captions:,} captions")
    return len(listed)


def _count_shard(directory: Path, line: Shard) -> tuple[Counter[str], int]:
    counts, captions = Counter[str](), 0
    for sample in usable_samples(directory, line, frozenset({"txt"})):
        counts.update(words_of(sample.members["txt"].decode("utf-8", "replace")))
        captions += 1
    return counts, captions
