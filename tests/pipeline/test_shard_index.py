"""The index of a shard beside the cache: made once, the same as the tar's, and not believed when it does not fit."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from formats.errors import UserError
from formats.manifest import Shard, read_manifest
from formats.tar import SampleIndex, index_samples
from pipeline.data import shard_reader
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shard_reader import index_path, read_index


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return read_manifest(str(write_shards(tmp_path / "shards", [6]))).shards[0]


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 2**20)


def read(shard: Shard, cache: ShardCache) -> SampleIndex:
    with cache.open_tar(shard) as tar:
        return read_index(shard, tar, cache)


def assert_right(index: SampleIndex, shard: Shard) -> None:
    expected = index_samples(shard.local_path, skip=())
    assert index.keys == expected.keys
    assert np.array_equal(index.spans_n4, expected.spans_n4)


def test_the_tar_is_walked_once(shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(read(shard, cache), shard)
    monkeypatch.setattr(shard_reader, "index_samples", lambda *_: pytest.fail("walked again"))
    index = read(shard, cache)
    monkeypatch.undo()
    assert_right(index, shard)


def test_skipped_keys_have_an_index_of_their_own(shard: Shard, cache: ShardCache) -> None:
    read(shard, cache)
    fewer = dataclasses.replace(shard, samples=5, skipped={"no_caption": ["00000002"]})
    assert "00000002" not in read(fewer, cache).keys
    assert_right(read(shard, cache), shard)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    path.write_bytes(stream.getvalue())


def test_a_damaged_index_is_made_anew(shard: Shard, cache: ShardCache) -> None:
    read(shard, cache)
    path = index_path(shard, cache)
    whole, arrays = path.read_bytes(), arrays_of(path)
    rng = random.Random(0)
    for _ in range(30):
        damaged = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.randrange(4) if damaged else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        assert_right(read(shard, cache), shard)
    spans = arrays["spans"]
    beyond, negative = spans.copy(), spans.copy()
    beyond[3, 1] = shard.size_bytes
    negative[0, 2] = -1
    pickled = np.empty(6, dtype=object)
    for wrong in (
        {"spans": beyond},
        {"spans": negative},
        {"spans": spans[:5]},
        {"spans": spans.astype(np.float64)},
        {"spans": pickled},
        {"keys": np.frombuffer(json.dumps(["a"]).encode(), np.uint8)},
        {"keys": pickled},
    ):
        write_arrays(path, arrays | wrong)
        assert_right(read(shard, cache), shard)


def test_a_shard_that_was_touched_is_compared_with_the_manifest(shard: Shard, cache: ShardCache) -> None:
    read(shard, cache)
    content = shard.local_path.read_bytes()
    os.utime(shard.local_path, ns=(1, 1))
    assert_right(read(shard, cache), shard)
    # another caption of the same length: same size, same headers but for nothing
    changed = content.replace(b"picture number 3", b"picture number 9")
    assert len(changed) == len(content)
    assert changed != content
    shard.local_path.write_bytes(changed)
    with pytest.raises(UserError, match="another SHA-256 than in the manifest"):
        read(shard, cache)


def test_a_full_cache_costs_time_only(shard: Shard, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "small", 100)
    assert_right(read(shard, cache), shard)
    assert not index_path(shard, cache).exists()
