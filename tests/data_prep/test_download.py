"""Real downloads from a server on this machine, through img2dataset's own processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_images import encoded
from PIL import Image
from small_web import Page, SmallWeb

from data_prep.download import Settings, download
from data_prep.errors import UserError
from data_prep.tar_reader import TarSamples
from data_prep.verify import verify

SETTINGS = Settings(image_size=32, samples_per_shard=6, processes=2, threads=8, timeout_s=2, retries=0)
SLOW_S = 3.0


@pytest.fixture(scope="module")
def web() -> Iterator[SmallWeb]:
    with SmallWeb() as server:
        yield server


def write_urls(path: Path, urls: list[str]) -> Path:
    captions = [f"caption {index}" for index in range(len(urls))]
    pq.write_table(
        pa.table({"uid": [f"u{index}" for index in range(len(urls))], "url": urls, "caption": captions}), path
    )
    return path


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def images_in(directory: Path) -> dict[str, tuple[str, tuple[int, int], dict]]:
    """uid -> (caption, (width, height), metadata) of every sample in the shards."""
    found = {}
    for path in sorted(directory.glob("*.tar")):
        for sample in TarSamples(path):
            metadata = json.loads(sample.members["json"])
            size = Image.open(io.BytesIO(sample.members["jpg"])).size
            found[metadata["uid"]] = (sample.members["txt"].decode(), size, metadata)
    return found


@pytest.mark.slow
def test_each_way_to_fail_and_going_on_afterwards(
    tmp_path: Path, web: SmallWeb, capsys: pytest.CaptureFixture[str]
) -> None:
    large, small = encoded(1, size=64), encoded(2, size=20)
    web.pages = {
        "/large.jpg": Page(large),
        "/small.png": Page(encoded(3, size=20, kind="PNG")),
        "/moved.jpg": Page(status=302, headers={"Location": "/small.jpg"}),
        "/small.jpg": Page(small),
        "/page.jpg": Page(b"<html></html>", headers={"Content-Type": "image/jpeg"}),
        "/cut.jpg": Page(large[: len(large) // 2]),
        "/broken.jpg": Page(large[:100], missing_bytes=500),
        "/private.jpg": Page(large, headers={"X-Robots-Tag": "noai"}),
        "/error.jpg": Page(status=500),
        "/slow.jpg": Page(large, delay_s=SLOW_S),
        "/circle.jpg": Page(status=302, headers={"Location": "/circle.jpg"}),
        "/to_file.jpg": Page(status=302, headers={"Location": "file:///etc/hostname"}),
    }
    urls = [web.url(path) for path in web.pages]
    urls += [web.url("/absent.jpg"), f"http://127.0.0.1:{closed_port()}/x.jpg", "http://no-such-host.invalid/x.jpg"]
    urls += [f"https{web.url('/large.jpg')[4:]}"]
    shards = tmp_path / "shards"
    outcomes = download(write_urls(tmp_path / "urls.parquet", urls), shards, SETTINGS)
    assert outcomes == {
        "ok": 4, "dns": 1, "connect": 2, "tls": 1, "timeout": 1, "http 4xx": 1, "http 5xx": 1, "opt-out": 1,
        "decode/resize": 2, "other": 2,
    }  # fmt: skip
    assert "decode/resize" in capsys.readouterr().out

    found = images_in(shards)
    assert {uid: entry[:2] for uid, entry in found.items()} == {
        "u0": ("caption 0", (32, 32)),  # scaled down
        "u1": ("caption 1", (20, 20)),  # not up
        "u2": ("caption 2", (20, 20)),  # found at its new address
        "u3": ("caption 3", (20, 20)),
    }
    assert found["u0"][2]["sha256"] == hashlib.sha256(large).hexdigest()
    assert verify(shards, processes=1, max_bad_ratio=0.0)

    # a finished download asks the network for nothing, and keeps what verify wrote
    requests = web.requests.copy()
    assert download(tmp_path / "urls.parquet", shards, SETTINGS) == outcomes
    assert web.requests == requests
    assert (shards / "manifest.jsonl").exists()

    # a shard that was being made when the power failed is made again, and only that one
    (shards / "00000_stats.json").write_text("")
    web.pages["/absent.jpg"] = Page(large)
    assert download(tmp_path / "urls.parquet", shards, SETTINGS) == outcomes
    assert web.requests["/large.jpg"] == requests["/large.jpg"] + 1
    assert web.requests["/absent.jpg"] == requests["/absent.jpg"]
    assert not (shards / "manifest.jsonl").exists()


@contextlib.contextmanager
def running_download(urls: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "data_prep", "download", str(urls), "--output", str(output)]
    command += ["--samples-per-shard", "4", "--processes", "1", "--threads", "4", "--retries", "0"]
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


def wait_until(condition, limit_s: float = 60.0) -> bool:
    end_s = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.1)
    return bool(condition())


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
        assert wait_until((output / "00000_stats.json").exists)
        assert wait_until(lambda: web.requests[paths[4]])  # the second shard hangs
        os.kill(child_of(process.pid) if victim == "child" else process.pid, signal.SIGKILL)
        _, message = process.communicate(timeout=30)
    if victim == "child":
        assert process.returncode == 2
        last = message.splitlines()[-1]
        assert last.startswith("error: 1 of 2 shards are missing: img2dataset ended with signal SIGKILL")
        assert "run the same command again" in last
        assert "Traceback" not in message
    assert wait_until(lambda: not processes_with(mark), limit_s=10)

    web.pages = {path: Page(encoded(0)) for path in paths}
    with running_download(urls, output) as process:
        process.communicate(timeout=100)
    assert process.returncode == 0
    assert len(images_in(output)) == 8
    assert web.requests[paths[0]] == 1
    assert not (output / "_tmp").exists()


def child_of(pid: int) -> int:
    """The process that runs img2dataset."""
    (task,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(task)


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
    with pytest.raises(UserError, match="another urls_sha256, rows, image_size"):
        download(urls, shards, SETTINGS)


def test_a_directory_with_other_shards_is_refused(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "urls.parquet", ["http://127.0.0.1/1"])
    (tmp_path / "00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="no download made"):
        download(urls, tmp_path, SETTINGS)
    assert (tmp_path / "00000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"uid": ["a"], "url": ["file:///etc/hostname"], "caption": ["x"]}, "not http"),
        ({"uid": ["a", "b"], "url": ["http://a/1", None], "caption": ["x", "y"]}, "not http"),
        ({"URL": ["http://a/1"], "TEXT": ["x"]}, "no column uid, url, caption: .*ingest"),
        ({"uid": pa.array([], pa.string()), "url": pa.array([], pa.string()), "caption": []}, "no rows"),
        (None, "no such file"),
    ],
)
def test_lists_that_ingest_did_not_make_are_refused(tmp_path: Path, table: dict | None, message: str) -> None:
    urls = tmp_path / "urls.parquet"
    if table is not None:
        pq.write_table(pa.table(table), urls)
    with pytest.raises(UserError, match=message):
        download(urls, tmp_path / "shards", SETTINGS)
    assert not (tmp_path / "shards").exists()


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "urls.parquet").write_text("url\tcaption\n")
    with pytest.raises(UserError, match=r"urls\.parquet"):
        download(tmp_path / "urls.parquet", tmp_path / "shards", SETTINGS)
