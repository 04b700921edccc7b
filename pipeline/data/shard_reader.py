"""What a loader process reads shards through: some stay open, and those that come next are made ready meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import IO

from formats.errors import UserError
from pipeline.data.manifest import Shard
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shard_index import index_path, read_index
from pipeline.data.tar_index import SampleIndex

_RETRY_S = 0.5


class OpenShard:
    """A shard whose index is in memory and whose bytes are read on demand."""

    def __init__(self, shard: Shard, tar: IO[bytes], index: SampleIndex) -> None:
        self.url = shard.url
        self.index = index
        self._is_local = shard.is_local
        self._tar = tar
        self._before = self._state()

    def read(self, sample: int) -> tuple[bytes, bytes]:
        """(image, caption) bytes of the n-th usable sample; raises UserError if the shard changed or cannot be read."""
        image_offset, image_size, text_offset, text_size = self.index.spans_n4[sample].tolist()
        descriptor = self._tar.fileno()
        try:
            image, text = os.pread(descriptor, image_size, image_offset), os.pread(descriptor, text_size, text_offset)
            state = self._state()
        except OSError as error:
            raise UserError(f"shard {self.url} can no longer be read: {error.strerror}") from error
        if state != self._before or len(image) + len(text) != image_size + text_size:
            raise UserError(f"shard {self.url} was changed or removed while it was read")
        return image, text

    def close(self) -> None:
        """Let go of the file."""
        self._tar.close()

    def _state(self) -> tuple[int, int, bool] | None:
        """What changes if a local tar is written to or removed; a copy in the cache is nobody else's."""
        if not self._is_local:
            return None
        status = os.fstat(self._tar.fileno())
        return status.st_size, status.st_mtime_ns, status.st_nlink > 0


class ShardReader:
    """Shards by their number, for one process after the other, forked or not."""

    def __init__(self, shards: Sequence[Shard], cache: ShardCache) -> None:
        self._shards = shards
        self._cache = cache
        self._open: dict[int, OpenShard] = {}
        self._prefetcher = Prefetcher(cache)

    def open(self, number: int, windows: Callable[[], tuple[Sequence[int], Sequence[int]]]) -> OpenShard:
        """A shard of the present window.

        If it was not open yet, `windows` is asked for the shards of the present window and the next: others are closed,
        and what is missing of these begins to be made ready. Raises UserError if the shard is missing or changed.
        """
        if number not in self._open:
            now, following = windows()
            for other in self._open.keys() - set(now):
                self._open.pop(other).close()
            self._prefetcher.want([self._shards[other] for other in (*now, *following)])
            shard = self._shards[number]
            tar = self._cache.open_tar(shard)
            self._open[number] = OpenShard(shard, tar, read_index(shard, tar, self._cache))
        return self._open[number]

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Sequence[Shard], ShardCache]]:
        # for processes that are not forked: open files stay behind
        return ShardReader, (self._shards, self._cache)


class Prefetcher:
    """Fetches and indexes shards in a thread, in the order given; each process of a node takes what no other has."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[Shard] = []
        self._newer = threading.Event()

    def want(self, shards: list[Shard]) -> None:
        """Make these ready, and begin no others."""
        if shards == self._wanted:
            return
        self._newer.set()
        self._wanted, self._newer = shards, threading.Event()
        if left := [shard for shard in shards if not self._is_ready(shard)]:
            threading.Thread(target=self._run, args=(left, self._newer), daemon=True).start()

    def _is_ready(self, shard: Shard) -> bool:
        has_tar = shard.is_local or self._cache.tar_path(shard).exists()
        return has_tar and index_path(shard, self._cache).exists()

    def _run(self, left: list[Shard], newer: threading.Event) -> None:
        while left:
            left = [shard for shard in left if not newer.is_set() and not self._make_ready(shard)]
            newer.wait(_RETRY_S)  # others are at what is left, or there is no room for it yet

    def _make_ready(self, shard: Shard) -> bool:
        """Whether there is nothing more to do; what fails here is said when the shard is read."""
        try:
            if not self._cache.prefetch(shard):
                return False
            with self._cache.open_tar(shard) as tar:
                read_index(shard, tar, self._cache)
        except (UserError, OSError):
            pass
        return True
