"""Downloads that are interrupted, repeated, or started where they must not be."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_helpers import ledger, samples, write_urls
from hypothesis import given
from hypothesis import strategies as st
from make_images import encoded
from small_web import Page, SmallWeb
from waiting import PATIENCE_S, wait_for

from data_prep.forget import forget
from data_prep.shards.publish import changing
from data_prep.shards.verify import verify
from data_prep.web.download import Settings, download, retry
from data_prep.web.passes import Pass, read_rows
from data_prep.web.processes import fill_missing_shards, working_in
from data_prep.web.shard_worker import ShardWorker
from formats.errors import UserError

# a machine with much to do may take long for a page of its own, too
SETTINGS = Settings(
    image_size=32, samples_per_shard=6, processes=2, threads=8, retries=0, allow_local=True,
    timeout_s=100, deadline_s=200,
)  # fmt: skip
KILLS = int(os.environ.get("CLUSTER_CLIP_KILLS", "4"))


@pytest.fixture(scope="module")
def web() -> Iterator[SmallWeb]:
    with SmallWeb() as server:
        yield server


@pytest.mark.slow
def test_only_missing_shards_are_made_again(tmp_path: Path, web: SmallWeb) -> None:
    web.pages = {f"/{index}.jpg": Page(encoded(index)) for index in range(8)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages])
    shards = tmp_path / "shards"
    assert download(urls, shards, SETTINGS) == {"ok": 8}

    # a finished download asks the network for nothing, and keeps what verify wrote
    (shards / "manifest.jsonl").write_text("{}")
    requests = web.requests.copy()
    assert download(urls, shards, SETTINGS) == {"ok": 8}
    assert web.requests == requests
    assert (shards / "manifest.jsonl").exists()

    # a shard that was being made when the power failed is made again, and only that one
    (shards / "00001_stats.json").write_text("")
    web.pages["/7.jpg"] = Page(status=404)
    with pytest.raises(UserError, match="not finished"):
        retry(shards, ["5xx"], SETTINGS)
    assert download(urls, shards, SETTINGS) == {"ok": 7, "4xx": 1}
    assert web.requests - requests == {"/6.jpg": 1, "/7.jpg": 1, "/robots.txt": 1}
    assert not (shards / "manifest.jsonl").exists()


@contextlib.contextmanager
def running_download(urls: Path, output: Path, processes: int = 1) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "data_prep", "download", str(urls), "--output", str(output), "--allow-local"]
    command += ["--samples-per-shard", "4", "--processes", str(processes), "--threads", "4", "--retries", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def processes_with(argument: str) -> set[int]:
    """Ids of the living processes that have `argument` on their command line or in their environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            if entry.name.isdecimal() and argument.encode() in command:
                found.add(int(entry.name))
    return found - {os.getpid()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["child", "parent"])
def test_a_killed_download_leaves_no_process_and_goes_on(
    tmp_path: Path, web: SmallWeb, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"CLUSTER_CLIP_TEST_{victim}_{os.getpid()}"
    monkeypatch.setenv("CLUSTER_CLIP_TEST_MARK", mark)
    paths = [f"/{victim}/{index}.jpg" for index in range(8)]
    web.pages = {path: Page(encoded(0), delay_s=0.0 if index < 4 else 60.0) for index, path in enumerate(paths)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in paths])
    output = tmp_path / "shards"
    with running_download(urls, output) as process:
        wait_for((output / "00000_stats.json").exists, "the first shard")
        wait_for(lambda: web.requests[paths[4]], "the second shard, which hangs")
        os.kill(child_of(process.pid) if victim == "child" else process.pid, signal.SIGKILL)
        _, message = process.communicate(timeout=PATIENCE_S)
    if victim == "child":
        assert process.returncode == 2
        last = message.splitlines()[-1]
        assert last.startswith("error: 1 of 2 shards are missing: the download ended with signal SIGKILL")
        assert "run the same command again" in last
        assert "Traceback" not in message
    wait_for(lambda: not processes_with(mark), "the end of all processes")

    web.pages = {path: Page(encoded(0)) for path in paths}
    with running_download(urls, output) as process:
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert len(samples(output)) == 8
    assert web.requests[paths[0]] == 1
    assert not (output / "_tmp").exists()


@pytest.mark.slow
def test_a_picture_that_kills_its_decoder_costs_itself(
    tmp_path: Path, web: SmallWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first time, when it may have been somebody who ended the download; nor the others of its shard."""
    code = "import os, signal; from data_prep.web import shard_worker; undisturbed = shard_worker.to_jpeg\n"
    code += "def to_jpeg(data, *others):\n"
    code += "    return os.kill(os.getpid(), signal.SIGKILL) if b'deadly' in data else undisturbed(data, *others)\n"
    code += "shard_worker.to_jpeg = to_jpeg\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    web.pages = {f"/{index}.jpg": Page(encoded(index) + b"deadly" * (index == 2)) for index in range(4)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages])
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        for _ in range(2):
            with pytest.raises(UserError, match="a picture that ends its worker twice is left out"):
                download(urls, tmp_path / "shards", SETTINGS)
        assert download(urls, tmp_path / "shards", SETTINGS) == {"ok": 3, "decode": 1}
    assert "killed, 2 times" in ledger(tmp_path / "shards")[web.url("/2.jpg")]["error_message"]
    assert not (tmp_path / "shards" / "_tmp").exists()


def child_of(pid: int) -> int:
    """The process that a process started last, or itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[-1]) if children else pid


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_killed_at_random_points_it_ends_with_the_same_set(tmp_path: Path, web: SmallWeb) -> None:
    """CLUSTER_CLIP_KILLS says how often; whoever is killed (command, child, worker) changes from time to time."""
    web.pages = {f"/{index}.jpg": Page(encoded(index), delay_s=0.1) for index in range(24 + 8 * KILLS)}
    paths = list(web.pages)
    for path in paths[::7]:
        web.pages[path] = Page(status=404)
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in paths])
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    download(urls, undisturbed, dataclasses.replace(SETTINGS, samples_per_shard=4, image_size=256))
    requests = web.requests.copy()

    choose = random.Random(KILLS)
    for _ in range(KILLS):
        with running_download(urls, killed) as process:
            time.sleep(choose.uniform(0.3, 3.0))
            victim = process.pid
            for _ in range(choose.randrange(3)):
                victim = child_of(victim)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            process.wait(timeout=PATIENCE_S)
        assert {path.suffix for path in killed.glob("[!.]*")} <= {".tar", ".parquet", ".json", ".jsonl", ".log", ""}
    with running_download(urls, killed) as process:
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0

    def content(directory: Path) -> dict[str, tuple[str, str, bytes]]:
        found = samples(directory)  # refuses duplicates
        return {uid: (entry["key"], caption, image.tobytes()) for uid, (image, caption, entry) in found.items()}

    assert content(killed) == content(undisturbed)
    assert len(content(killed)) == len(paths) - len(paths[::7])
    outcomes = {url: (row["class"], row["key"], row["sha256"]) for url, row in ledger(killed).items()}
    assert outcomes == {url: (row["class"], row["key"], row["sha256"]) for url, row in ledger(undisturbed).items()}
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
    assert sum((web.requests - requests).values()) < (KILLS + 1) * sum(requests.values())


@pytest.mark.slow
def test_two_downloads_keep_out_of_each_others_way(
    tmp_path: Path, web: SmallWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.web.processes.PREDECESSOR_S", 0.1)
    web.pages = {"/slow.jpg": Page(encoded(0), delay_s=60)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url("/slow.jpg")])
    settings = dataclasses.replace(SETTINGS, samples_per_shard=4, image_size=256)
    with running_download(urls, tmp_path / "shards"):
        wait_for(lambda: web.requests["/slow.jpg"], "the first download")
        with pytest.raises(UserError, match="another download is at work"):
            download(urls, tmp_path / "shards", settings)
        (tmp_path / "hosts.txt").write_text("example.org")
        with pytest.raises(UserError, match="another data-prep command works on"):
            forget(tmp_path / "shards", tmp_path / "hosts.txt", "host", 1)
    with changing(tmp_path / "shards"), pytest.raises(UserError, match="another data-prep command works on"):
        download(urls, tmp_path / "shards", settings)


@pytest.mark.slow
def test_array_jobs_share_the_shards(tmp_path: Path, web: SmallWeb) -> None:
    web.pages = {f"/{index}.jpg": Page(encoded(index)) for index in range(20)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages])
    settings = dataclasses.replace(SETTINGS, samples_per_shard=4)
    shards = tmp_path / "shards"
    assert download(urls, shards, settings, share=(1, 2)) == {"ok": 8}
    assert sorted(path.name for path in shards.glob("*.tar")) == ["00001.tar", "00003.tar"]
    assert download(urls, shards, settings, share=(0, 2)) == {"ok": 20}
    requests = web.requests.copy()
    assert download(urls, shards, settings) == {"ok": 20}
    assert web.requests == requests
    assert len(samples(shards)) == 20


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named_and_leaves_nothing_half_made(tmp_path: Path, web: SmallWeb) -> None:
    web.pages = {f"/{index}.jpg": Page(encoded(index, size=200)) for index in range(4)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages])
    command = [sys.executable, "-m", "data_prep", "download", str(urls), "--output", str(tmp_path / "shards")]
    command += ["--samples-per-shard", "2", "--processes", "1", "--allow-local"]
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "-", *command]  # KiB a file
    done = subprocess.run(limited, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 2 of 2 shards are missing: the download said 'shard ")
    assert "File too large" in last
    assert "Traceback" not in done.stderr
    assert not [path.name for path in (tmp_path / "shards").iterdir() if "tar" in path.name]
    assert subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False).returncode == 0
    assert len(samples(tmp_path / "shards")) == 4


@pytest.mark.slow
def test_no_image_at_all_is_an_error(tmp_path: Path, web: SmallWeb) -> None:
    urls = write_urls(tmp_path / "urls.parquet", [web.url("/gone/1"), web.url("/gone/2")])
    with pytest.raises(UserError, match="none of 2 urls gave an image"):
        download(urls, tmp_path / "shards", SETTINGS)


def test_a_directory_with_another_download_is_refused(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "urls.parquet", ["http://127.0.0.1/1"])
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "provenance.jsonl").write_text(json.dumps({"step": "download", "urls": "urls.parquet"}) + "\n")
    with pytest.raises(UserError, match="another url list, --samples-per-shard, --image-size"):
        download(urls, shards, SETTINGS)


def test_a_directory_with_other_shards_is_refused(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "urls.parquet", ["http://127.0.0.1/1"])
    (tmp_path / "00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="no download made"):
        download(urls, tmp_path, SETTINGS)
    assert (tmp_path / "00000.tar").read_bytes() == b"precious"


# what some writers call text
NOT_UTF8 = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"uid": ["a"], "url": ["file:///etc/hostname"], "caption": ["x"]}, "not http"),
        ({"uid": ["a", "b"], "url": ["http://a/1", None], "caption": ["x", "y"]}, "not http"),
        ({"URL": ["http://a/1"], "TEXT": ["x"]}, "no column uid, url, caption: .*ingest"),
        ({"uid": pa.array([], pa.string()), "url": pa.array([], pa.string()), "caption": []}, "no rows"),
        (None, "no such file"),
        ({"uid": ["a"], "url": ["http://a/1"], "caption": [None]}, "its column caption is null, not text: .*ingest"),
        ({"uid": ["a", "b"], "url": ["http://a/1"] * 2, "caption": ["x", None]}, "rows without caption: .*ingest"),
        ({"uid": ["a", None], "url": ["http://a/1"] * 2, "caption": ["x", "y"]}, "rows without uid: .*ingest"),
        ({"uid": ["a"], "url": ["http://a/1"], "caption": [["x"]]}, "its column caption is list.*ingest"),
        (
            {"uid": ["a"], "url": ["http://a/1"], "caption": [b"\xff"]},
            "its column caption is binary, not text: .*ingest",
        ),
        ({"uid": ["a"], "url": ["http://a/1"], "caption": ["x"], "sha256": [b"\xff"]}, "its column sha256 is binary"),
        ({"uid": ["a"], "url": ["http://a/1"], "caption": NOT_UTF8}, "UTF8.*ingest"),
    ],
)
def test_lists_that_ingest_did_not_make_are_refused(tmp_path: Path, table: dict | None, message: str) -> None:
    urls = tmp_path / "urls.parquet"
    if table is not None:
        pq.write_table(pa.table(table), urls)
    with pytest.raises(UserError, match=message):
        download(urls, tmp_path / "shards", SETTINGS)
    assert not (tmp_path / "shards").exists()


def test_parts_that_differ_are_refused(tmp_path: Path) -> None:
    row = {"uid": ["a"], "url": ["http://127.0.0.1/1"], "caption": ["x"]}
    parts = tmp_path / "parts"
    parts.mkdir()
    pq.write_table(pa.table(row | {"width": [1]}), parts / "0.parquet")
    for width, message in (({"width": [1.5]}, "width is double, and int64 in 0.parquet"), ({}, "width is absent")):
        pq.write_table(pa.table(row | width), parts / "1.parquet")
        with pytest.raises(UserError, match=message):
            download(parts, tmp_path / "shards", SETTINGS)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([None, None], "all of --blur-column faces is null"),
        ([[[0.1, 0.1, 0.2, 0.2]], [[0.5, 0.5, 0.2, 0.2]]], "is not .left, top, right, bottom.: .0.5, 0.5, 0.2, 0.2"),
        (["[[0, 0, 1, 1]]", "none"], "boxes to blur are no JSON: none"),
        ([0.1, 0.2], "not boxes to blur: 0.1"),
    ],
)
def test_a_column_to_blur_that_cannot_be_read_is_refused(tmp_path: Path, boxes: list, message: str) -> None:
    """Before work begins: unblurred faces are worse than none."""
    urls = write_urls(tmp_path / "urls.parquet", ["http://127.0.0.1/1", "http://127.0.0.1/2"], faces=boxes)
    with pytest.raises(UserError, match=message):
        download(urls, tmp_path / "shards", dataclasses.replace(SETTINGS, blur_column="faces"))
    with pytest.raises(UserError, match="no column face: "):
        download(urls, tmp_path / "shards", dataclasses.replace(SETTINGS, blur_column="face"))
    assert not (tmp_path / "shards").exists()


def test_a_filesystem_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", absent)
    (tmp_path / "shards").mkdir()
    with working_in(tmp_path / "shards") as log:
        assert not log.closed


class OddError(Exception):
    """A defect."""


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "run the same command again"),
        (OddError(), "this is a defect"),
    ],
)
def test_only_what_may_mend_is_to_be_run_again(
    tmp_path: Path, error: Exception, advice: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    urls = write_urls(tmp_path / "urls.parquet", ["http://127.0.0.1/1"])
    one = Pass(1, urls, rows=1, classes=(), first_shard=0, samples_per_shard=1)
    monkeypatch.setattr("data_prep.web.shard_worker.read_rows", lambda *_: (_ for _ in ()).throw(error))
    assert ShardWorker(tmp_path, one, SETTINGS)((0, (0, 1))) == (False, (0, (0, 1)))
    said = capfd.readouterr().out
    with (tmp_path / "log").open("wb") as log:
        monkeypatch.setattr(
            "data_prep.web.processes._child", lambda *_: contextlib.nullcontext(Ended(tmp_path / "log", said))
        )
        with pytest.raises(UserError, match=advice):
            fill_missing_shards(tmp_path, one, SETTINGS, log)


@dataclasses.dataclass
class Ended:
    """A child that has said something and ended."""

    log: Path
    said: str

    def poll(self) -> int:
        self.log.write_text(self.said)
        return 0


@pytest.mark.slow
def test_after_forget_and_retry_the_counts_add_up(tmp_path: Path, web: SmallWeb) -> None:
    web.pages = {"/0.jpg": Page(encoded(0)), "/1.jpg": Page(status=503), "/2.jpg": Page(status=503)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages])
    shards = tmp_path / "shards"
    assert download(urls, shards, SETTINGS) == {"ok": 1, "5xx": 2}
    verify(shards, processes=1, max_bad_ratio=0.0)
    (tmp_path / "list").write_text(web.url("/1.jpg"))
    forget(shards, tmp_path / "list", "url", 1)
    web.pages["/1.jpg"] = web.pages["/2.jpg"] = Page(encoded(1))
    asked = web.requests.copy()
    assert retry(shards, ["5xx"], SETTINGS) == {"ok": 2, "forgotten": 1}
    assert not (web.requests - asked)["/1.jpg"]
    assert retry(shards, ["5xx"], SETTINGS) == {"ok": 2, "forgotten": 1}
    with pytest.raises(UserError, match="no such class"):
        retry(shards, ["forgotten"], SETTINGS)


def test_robots_files_and_names_serve_all_shards_of_a_process(tmp_path: Path) -> None:
    with SmallWeb() as web:
        web.pages = {f"/{index}.jpg": Page(encoded(index)) for index in range(6)}
        urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages])
        one = Pass(1, urls, rows=6, classes=(), first_shard=0, samples_per_shard=2)
        (tmp_path / "_tmp").mkdir()
        for shard in one.numbers:
            assert ShardWorker(tmp_path, one, SETTINGS)((shard, one.rows_of(shard)))[0]
        assert web.requests["/robots.txt"] == 1


@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_rows_of_a_folder_of_parts_are_those_of_one_file(parts: list[int], data: st.DataObject) -> None:
    rows = list(range(sum(parts)))
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        first = 0
        for number, count in enumerate(parts):
            table = pa.table({"n": rows[first : first + count]})
            pq.write_table(table, Path(folder) / f"part-{number:05d}.parquet", row_group_size=4)
            first += count
        assert read_rows(Path(folder), start, stop)["n"].to_pylist() == rows[start:stop]


@pytest.mark.slow
def test_a_folder_of_parts_is_one_list(tmp_path: Path, web: SmallWeb) -> None:
    web.pages = {f"/{index}.jpg": Page(encoded(index)) for index in range(8)}
    parts = tmp_path / "parts"
    parts.mkdir()
    whole = pq.read_table(write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages]))
    pq.write_table(whole.slice(0, 3), parts / "part-00000.parquet")
    pq.write_table(whole.slice(3), parts / "part-00001.parquet")
    assert download(parts, tmp_path / "shards", SETTINGS) == {"ok": len(web.pages)}
    assert download(parts, tmp_path / "shards", SETTINGS) == {"ok": len(web.pages)}  # the same list
    assert len(samples(tmp_path / "shards")) == len(web.pages)
    pq.write_table(whole.slice(4), parts / "part-00001.parquet")
    with pytest.raises(UserError, match="another url list: use"):
        download(parts, tmp_path / "shards", SETTINGS)


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "urls.parquet").write_text("url\tcaption\n")
    with pytest.raises(UserError, match=r"urls\.parquet"):
        download(tmp_path / "urls.parquet", tmp_path / "shards", SETTINGS)
