"""Good urls that a download loses to a web of many slow hosts, with few file descriptors.

    python benchmarks/hostile_web.py [--hosts 3000] [--latency-s 0.3] [--descriptors 1024]

Every host is an address of 127.0.0.0/8 that keeps its connections, answers after the latency, and has three urls: a
picture, one that is gone, and a picture with something odd around it (a reason phrase in Latin-1, a header of 60 KB, a
redirect with raw bytes, a compressed robots.txt). `data-prep download` runs under `ulimit -n`; what counts is what it
says of each url, not how fast.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from record import record

from data_prep.web.ledger import last_outcomes

SHARD = 1000
EXPECTED = {"good": "ok", "gone": "4xx", "odd": "ok"}  # the last part of a url -> its class
ROBOTS = b"\xef\xbb\xbfUser-agent: *\nDisallow: /private\n"


def picture() -> bytes:
    """A small JPEG."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def answer_to(path: bytes, image: bytes) -> bytes:
    """What a host says to a request; its connection stays open."""
    status, headers, body = b"200 OK", b"", image
    if path == b"/robots.txt":
        headers, body = b"Content-Encoding: x-gzip\r\n", gzip.compress(ROBOTS)
    elif path.endswith(b"/gone"):
        status, body = b"404 N\xe3o encontrado", b""
    elif path.endswith(b"/odd"):
        status, headers, body = b"302 D\xe9plac\xe9", b"Location: /caf\xe9?x=\xff\r\n", b""
    else:
        headers = b"X-Padding: " + b"x" * 60_000 * path.startswith(b"/caf") + b"\r\n"
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, headers, len(body), body)


def serve(latency_s: float, port: Connection) -> None:
    """Answer on all of 127.0.0.0/8, connections kept for as long as the clients like."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    image = picture()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while request := await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(latency_s)
                writer.write(answer_to(request.split(b" ")[1], image))
                await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(one, "0.0.0.0", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextlib.contextmanager
def serving(latency_s: float) -> Iterator[int]:
    """The server's port; it runs in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(latency_s, theirs), daemon=True)
    server.start()
    try:
        yield ours.recv()
    finally:
        server.kill()


def write_urls(path: Path, hosts: int, port: int) -> None:
    """A canonical list: the hosts by turns, so that none comes twice in a row."""
    urls = [f"http://127.1.{n // 250}.{1 + n % 250}:{port}/{n}/{kind}" for kind in EXPECTED for n in range(hosts)]
    pq.write_table(
        pa.table({"uid": [f"{n}" for n in range(len(urls))], "url": urls, "caption": ["a picture"] * len(urls)}), path
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3000, metavar="N")
    parser.add_argument("--latency-s", type=float, default=0.3, metavar="S")
    parser.add_argument("--descriptors", type=int, default=1024, metavar="N")
    parser.add_argument("--threads", type=int, default=64, metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, serving(options.latency_s) as port:
        folder = Path(scratch)
        write_urls(folder / "urls.parquet", options.hosts, port)
        command = [
            sys.executable,
            "-m",
            "data_prep",
            "download",
            f"{folder}/urls.parquet",
            "--output",
            f"{folder}/shards",
        ]
        command += ["--allow-local", "--retries", "0", "--processes", "2", "--samples-per-shard", f"{SHARD}"]
        command += ["--image-size", "32", "--threads", f"{options.threads}"]
        limited = ["bash", "-c", f'ulimit -n {options.descriptors}; exec "$@"', "-", *command]
        subprocess.run(limited, check=True, cwd=Path(__file__).resolve().parents[1])
        rows = [
            row for table in last_outcomes(folder / "shards", ["url", "error_message"]) for row in table.to_pylist()
        ]
    wrong = [row for row in rows if row["class"] != EXPECTED[row["url"].rpartition("/")[2]]]
    for row in wrong[:10]:
        print(row)
    good = [row for row in rows if EXPECTED[row["url"].rpartition("/")[2]] == "ok"]
    figures = {
        "urls": len(rows),
        "good_urls": len(good),
        "good_urls_lost": sum(row["class"] != "ok" for row in good),
        "wrong_outcomes": len(wrong),
        "outcomes": dict(Counter(row["class"] for row in rows)),
        "hosts": options.hosts,
        "latency_s": options.latency_s,
        "descriptors": options.descriptors,
    }
    print(json.dumps(figures, indent=2))
    shown = f"--hosts {options.hosts} --latency-s {options.latency_s} --descriptors {options.descriptors}"
    record("hostile_web", figures, f"python benchmarks/hostile_web.py {shown} --threads {options.threads}", 1)


if __name__ == "__main__":
    main()
