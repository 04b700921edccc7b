"""The node's cache of remote shards: what comes over HTTP, goes when room is needed, and survives kills."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from conftest import write_shards
from small_web import Page, SmallWeb
from waiting import PATIENCE_S, wait_for

from formats.errors import UserError
from formats.manifest import Shard, read_manifest
from pipeline.data import shard_cache
from pipeline.data.captions import load_tokenizer
from pipeline.data.data_loader import BATCHES_AHEAD, Batch, MicroBatches, TrainingSet, make_loader
from pipeline.data.sample_order import BatchPlan
from pipeline.data.shard_cache import ShardCache, check_room, make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import read_training_data
from pipeline.recipe import DataSection, TextMaskingSection

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def web() -> Iterator[SmallWeb]:
    with SmallWeb() as server:
        yield server


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "_FIRST_DELAY_S", 0.01)


def publish(web: SmallWeb, directory: Path) -> str:
    """Serve a shard directory; its URL."""
    for path in directory.iterdir():
        web.pages[f"/{path.name}"] = Page(path.read_bytes())
    return web.url("")


def shard_of(content: bytes, url: str) -> Shard:
    directory, _, name = url.rpartition("/")
    return Shard(name, 1, len(content), hashlib.sha256(content).hexdigest(), directory=directory)


def memory_shard(name: str, size_bytes: int) -> Shard:
    content = random.Random(name).randbytes(size_bytes)
    fsspec.filesystem("memory").pipe(f"/cache_test/{name}", content)
    return shard_of(content, f"memory://cache_test/{name}")


def names(directory: Path) -> list[str]:
    """What the cache holds, its lock aside."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def taken_bytes(directory: Path) -> int:
    total = 0
    for path in directory.iterdir():
        if path.suffix != ".txt":
            with contextlib.suppress(FileNotFoundError):  # other processes are at work
                total += path.stat().st_size
    return total


def test_remote_samples_are_those_of_the_local_tars(tmp_path: Path, web: SmallWeb) -> None:
    local = read_manifest(str(write_shards(tmp_path / "shards", [3, 4, 2])))
    remote = read_manifest(publish(web, tmp_path / "shards"))
    cache = ShardCache(tmp_path / "cache", 2**20)
    readers = [ShardReader(manifest.shards, cache) for manifest in (local, remote)]
    for number, shard in enumerate(local.shards):
        here, there = (reader.open(number, lambda: ([0, 1, 2], [])) for reader in readers)
        assert here.index.keys == there.index.keys
        assert [here.read(n) for n in range(shard.samples)] == [there.read(n) for n in range(shard.samples)]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "00000.tar", "00001.tar", "00002.tar", "manifest.jsonl",
    ]  # fmt: skip


def test_what_is_transient_is_tried_again(tmp_path: Path, web: SmallWeb) -> None:
    content = b"x" * 5000
    good = Page(content)
    web.pages["/a.tar"] = [Page(b"busy", 503), Page(content[:4000], missing_bytes=1000), Page(b"y" * 5000), good]
    with ShardCache(tmp_path, 2**20).open_tar(shard_of(content, web.url("/a.tar"))) as file:
        assert file.read() == content
    assert names(tmp_path) == [path.name for path in tmp_path.glob("*.tar")]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (Page(b"gone", 404), "is in the manifest but cannot be read"),
        (Page(b"busy", 503), "cannot be fetched, tried 5 times"),
        (Page(b"x" * 4999), "4,999 bytes, not 5,000"),
        (Page(b"x" * 5001), "more than its 5,000 bytes"),
        (Page(b"y" * 5000), "another SHA-256"),
    ],
    ids=["gone", "never there", "shorter", "longer", "changed"],
)
def test_what_is_for_good_names_the_shard_and_leaves_nothing(
    tmp_path: Path, web: SmallWeb, page: Page, message: str
) -> None:
    web.pages["/a.tar"] = page
    shard = shard_of(b"x" * 5000, web.url("/a.tar"))
    with pytest.raises(UserError, match=message) as error:
        ShardCache(tmp_path, 2**20).open_tar(shard)
    assert shard.url in str(error.value)
    assert names(tmp_path) == []


def test_a_full_disk_is_said_at_once() -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"kept in data\.cache_directory: No space left"):
        shard_cache._download(memory_shard("full", 10), FullDisk())


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_and_nothing_open_goes(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random opening and closing, against a model that knows only which shards are open."""
    monkeypatch.setattr(shard_cache, "_PATIENCE_S", 0)
    rng = random.Random(seed)
    shards = [memory_shard(f"{seed}_{number}", rng.randrange(1, 400)) for number in range(12)]
    cache = ShardCache(tmp_path, 1000)
    (tmp_path / "somebody_elses.txt").write_bytes(b"x" * 2000)
    open_files = []
    for _ in range(120):
        if open_files and rng.random() < 0.45:
            open_files.pop(rng.randrange(len(open_files)))[1].close()
            continue
        shard = rng.choice(shards)
        needed = {other.url: other.size_bytes for other, _ in open_files} | {shard.url: shard.size_bytes}
        if sum(needed.values()) <= 1000:
            open_files.append((shard, cache.open_tar(shard)))
        else:
            with pytest.raises(UserError, match=r"data\.cache_gib"):
                cache.open_tar(shard)
        assert taken_bytes(tmp_path) <= 1000
        for opened, file in open_files:
            assert cache.tar_path(opened).exists()
            assert hashlib.sha256(os.pread(file.fileno(), 1000, 0)).hexdigest() == opened.sha256
    for _, file in open_files:
        file.close()
    assert (tmp_path / "somebody_elses.txt").exists()


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 300)
    a, b, c, d = (memory_shard(f"lru_{name}", 100) for name in "abcd")
    for shard in (a, b, c, a, d):
        cache.open_tar(shard).close()
        time.sleep(0.01)
    assert [cache.tar_path(shard).exists() for shard in (a, b, c, d)] == [True, False, True, True]


def _open_and_check(directory: Path, shard: Shard, start: object, failures: object) -> None:
    start.wait()
    with ShardCache(directory, 2**20).open_tar(shard) as file:
        if hashlib.sha256(file.read()).hexdigest() != shard.sha256:
            failures.value += 1


def test_processes_that_want_the_same_shard_fetch_it_once(tmp_path: Path, web: SmallWeb) -> None:
    content = random.Random(0).randbytes(200_000)
    web.pages["/a.tar"] = Page(content, delay_s=0.2)
    start, failures = FORK.Event(), FORK.Value("i", 0)
    arguments = (tmp_path, shard_of(content, web.url("/a.tar")), start, failures)
    processes = [FORK.Process(target=_open_and_check, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert failures.value == 0
    alone = SmallWeb()
    with alone:
        alone.pages["/a.tar"] = Page(content)
        ShardCache(tmp_path / "other", 2**20).open_tar(shard_of(content, alone.url("/a.tar"))).close()
    assert web.requests["/a.tar"] == alone.requests["/a.tar"]


def test_a_kill_while_fetching_leaves_nothing_that_matters(tmp_path: Path, web: SmallWeb) -> None:
    content = random.Random(1).randbytes(300_000)

    def slowly() -> Iterator[bytes]:
        for first in range(0, len(content), 1000):
            yield content[first : first + 1000]
            time.sleep(0.05)

    shard = shard_of(content, web.url("/a.tar"))
    web.pages["/a.tar"] = Page(stream=slowly)
    start = FORK.Event()
    start.set()
    killed = FORK.Process(target=_open_and_check, args=(tmp_path, shard, start, FORK.Value("i", 0)))
    killed.start()
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("*.part")), "the first bytes")
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert names(tmp_path) != []

    # another shard that needs the room that the dead process had reserved
    other = memory_shard("after_kill", 200_000)
    cache = ShardCache(tmp_path, 400_000)
    cache.open_tar(other).close()
    assert names(tmp_path) == [cache.tar_path(other).name]
    web.pages["/a.tar"] = Page(content)
    with cache.open_tar(shard) as file:
        assert file.read() == content


def test_the_next_window_is_there_before_it_is_asked_for(tmp_path: Path, web: SmallWeb) -> None:
    write_shards(tmp_path / "shards", [2, 2, 2, 2])
    manifest = read_manifest(publish(web, tmp_path / "shards"))
    cache = ShardCache(tmp_path / "cache", 2**20)
    reader = ShardReader(manifest.shards, cache)
    reader.open(3, lambda: ([3, 1], [0, 2]))
    wait_for(lambda: len(list((tmp_path / "cache").glob("*.npz"))) == 4, "the next window")
    before = web.requests.copy()
    for number in (1, 0, 2):
        reader.open(number, lambda: ([1, 0, 2], [3]))
    assert web.requests == before


def test_a_cache_below_what_is_open_at_once_is_refused() -> None:
    shards = [Shard(f"{n}.tar", 1000, 2**30, "", directory="memory://x") for n in range(40)]
    fits = DataSection(window_shards=4, cache_gib=8.15)
    check_room(shards, fits, 1, samples_ahead=100)
    with pytest.raises(UserError, match=r"window_shards=4 shards of each set take up to 8 GiB, 200 samples"):
        check_room(shards, fits, 1, samples_ahead=200)
    check_room(shards[:8], DataSection(window_shards=4, cache_gib=8), 1, samples_ahead=10**6)  # all shards fit
    check_room([Shard("0.tar", 1000, 2**40, "", directory="/x")], fits, 1, samples_ahead=100)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_directory .*file/cache cannot be made"):
        make_cache(DataSection(cache_directory=str(tmp_path / "file" / "cache")))


@pytest.mark.parametrize("change", ["removed", "longer", "overwritten", "shorter"])
def test_a_local_shard_that_changes_while_it_is_read(tmp_path: Path, change: str) -> None:
    directory = write_shards(tmp_path / "shards", [4])
    path = directory / "00000.tar"
    shard = ShardReader(read_manifest(str(directory)).shards, ShardCache(tmp_path / "cache", 2**20)).open(
        0, lambda: ([0], [])
    )
    shard.read(0)
    if change == "removed":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.seek(0 if change == "overwritten" else path.stat().st_size)
            file.write(b"x")
            if change == "shorter":
                file.truncate(1000)
    with pytest.raises(UserError, match=r"00000\.tar was changed or removed"):
        shard.read(1)


def test_a_remote_shard_that_changed_since_it_was_verified(tmp_path: Path, web: SmallWeb) -> None:
    directory = write_shards(tmp_path / "shards", [2])
    url = publish(web, directory)
    line = json.loads((directory / "manifest.jsonl").read_text())
    web.pages["/00000.tar"] = Page(b"\1" * line["bytes"])
    with pytest.raises(UserError, match=r"00000\.tar cannot be fetched.*SHA-256.*data-prep verify"):
        ShardReader(read_manifest(url).shards, ShardCache(tmp_path / "cache", 2**20)).open(0, lambda: ([0], []))


def batches_of(section: DataSection, tokenizer_file: Path, steps: int) -> Iterator[Batch]:
    data = read_training_data(section)
    captions = TextMasker(load_tokenizer(str(tokenizer_file), 64), TextMaskingSection())
    reader = ShardReader(data.shards, make_cache(section))
    dataset = TrainingSet(reader, data.order(section, 0), 0, captions, 16, 0.9)
    plan = BatchPlan(data.num_samples, 4, 4, 1)
    batches = iter(make_loader(dataset, MicroBatches(plan, 0, 0, steps), section.workers, pin_memory=False))
    try:
        yield from batches
    finally:  # after a worker's error its traceback keeps them, and Python would wait for the workers at its end
        getattr(batches, "_shutdown_workers", list)()


def test_workers_stream_epochs_through_a_cache_of_two_windows(
    tmp_path: Path, web: SmallWeb, tokenizer_file: Path
) -> None:
    directory, cache = write_shards(tmp_path / "shards", [20] * 10), tmp_path / "cache"
    local = DataSection(train=str(directory), window_shards=2, cache_directory=str(tmp_path / "other"))
    expected = [batch.keys for batch in batches_of(local, tokenizer_file, 100)]
    url = publish(web, directory)
    shards = read_manifest(url).shards
    options = {"window_shards": 2, "workers": 2, "cache_directory": str(cache)}
    ahead = 2 * BATCHES_AHEAD * 4
    needed_bytes = 4 * shards[0].size_bytes + math.ceil(ahead * shards[0].size_bytes / 20)
    section = DataSection(train=url, cache_gib=needed_bytes / 2**30, **options)
    check_room(shards, section, 1, samples_ahead=ahead)
    with pytest.raises(UserError, match="too small"):
        check_room(shards, DataSection(train=url, cache_gib=(needed_bytes - 1) / 2**30, **options), 1, ahead)

    seen = []
    for batch in batches_of(section, tokenizer_file, 100):
        seen.append([key.rpartition("/")[2] for key in batch.keys])
        # while it adds up, a worker may remove a shard that is counted and begin another
        assert min(taken_bytes(cache) for _ in range(3)) <= needed_bytes
    assert seen == [[key.rpartition("/")[2] for key in keys] for keys in expected]


def test_a_remote_shard_that_vanishes_is_named_by_the_worker_that_needs_it(
    tmp_path: Path, web: SmallWeb, tokenizer_file: Path
) -> None:
    url = publish(web, write_shards(tmp_path / "shards", [8] * 4))
    section = DataSection(train=url, window_shards=1, workers=1, cache_directory=str(tmp_path / "cache"), cache_gib=1)
    del web.pages["/00002.tar"]
    with pytest.raises(UserError, match=r"/00002\.tar is in the manifest but cannot be read"):
        list(batches_of(section, tokenizer_file, 20))
