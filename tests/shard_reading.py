"""A shard's index as the loader makes it, without what an earlier test left in a cache."""

from __future__ import annotations

import tempfile
from pathlib import Path

from formats.manifest import Shard
from formats.tar import SampleIndex
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shard_reader import read_index


def loader_index(shard: Shard) -> SampleIndex:
    """Raises UserError as the loader does: for a shard that is gone, or is not what its manifest says."""
    with tempfile.TemporaryDirectory() as directory:
        cache = ShardCache(Path(directory), 2**20)
        with cache.open_tar(shard) as tar:
            return read_index(shard, tar, cache)
