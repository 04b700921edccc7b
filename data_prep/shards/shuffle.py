"""A uniform shuffle of more samples than fit in memory, in two passes.

The first throws each sample into a bucket drawn at random, a file each; the second shuffles one bucket after the other
in memory. That is sorting by random numbers, of which the bucket is the leading digits: every order is equally likely.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_prep.shards.writer import Members
from formats.files import write_json

STATE = "buckets.json"
_BUCKETS_PER_MEMORY = 3  # a bucket, the samples cut out of it, and the room that chance needs

Source = TypeVar("Source")


class BucketShuffle:
    """Shuffle the samples of `sources` in at most about `memory_bytes`, with files in `folder`.

    The order depends on the seed, the sources and the number of buckets alone. The first pass goes on where an
    earlier, interrupted one in the same folder had got to.
    """

    def __init__(self, folder: Path, total_bytes: int, memory_bytes: int, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._memory_bytes = memory_bytes
        self._count = 1 + _BUCKETS_PER_MEMORY * total_bytes // memory_bytes
        self._waiting: dict[int, list[bytes]] = {}
        self._waiting_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What the buckets hold."""
        return sum(self._sizes())

    def scatter(self, sources: Sequence[Source], read: Callable[[Source], Iterable[Members]]) -> Iterator[Source]:
        """The first pass; gives each source when it has been read."""
        for number in range(self._resume(), len(sources)):
            rng = random.Random(f"{self._seed}/{number}")
            for members in read(sources[number]):
                self._add(rng.randrange(self._count), _pack(members))
            self._flush()
            write_json(self._folder / STATE, {"sources": number + 1, "bytes": self._sizes()})
            yield sources[number]

    def gather(self) -> Iterator[Members]:
        """The second pass: the samples in their new order."""
        for bucket in range(self._count):
            path = self._path(bucket)
            samples = list(_unpack(path.read_bytes())) if path.exists() else []
            random.Random(f"{self._seed}/bucket/{bucket}").shuffle(samples)
            yield from samples

    def _resume(self) -> int:
        """Cut off what was not accounted for; returns how many sources are done."""
        state_file = self._folder / STATE
        state: dict[str, Any] = {"sources": 0, "bytes": [0] * self._count}
        if state_file.exists():
            state = json.loads(state_file.read_text(encoding="utf-8"))
        for bucket, size_bytes in enumerate(state["bytes"]):
            path = self._path(bucket)
            if path.exists():
                with path.open("r+b") as stream:
                    stream.truncate(size_bytes)
        return int(state["sources"])

    def _add(self, bucket: int, sample: bytes) -> None:
        self._waiting.setdefault(bucket, []).append(sample)
        self._waiting_bytes += len(sample)
        if self._waiting_bytes >= self._memory_bytes // _BUCKETS_PER_MEMORY:
            self._flush()

    def _flush(self) -> None:
        # opened for each flush: there may be more buckets than a process may have files open
        for bucket, samples in self._waiting.items():
            with self._path(bucket).open("ab") as stream:
                stream.writelines(samples)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _sizes(self) -> list[int]:
        paths = map(self._path, range(self._count))
        return [path.stat().st_size if path.exists() else 0 for path in paths]

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:05d}"


def _pack(members: Members) -> bytes:
    """A line of JSON with the names and sizes, then the contents."""
    sizes = {name: len(content) for name, content in members.items()}
    return b"".join([json.dumps(sizes).encode("ascii"), b"\n", *members.values()])


def _unpack(bucket: bytes) -> Iterator[Members]:
    position = 0
    while position < len(bucket):
        end_of_line = bucket.index(b"\n", position)
        sizes: dict[str, int] = json.loads(bucket[position:end_of_line])
        position = end_of_line + 1
        members = {}
        for name, size_bytes in sizes.items():
            members[name] = bucket[position : position + size_bytes]
            position += size_bytes
        yield members
