"""Images/s of `data-prep download`, all its checks on, over those of bare img2dataset with the same settings.

    python benchmarks/data_prep_download.py FLICKR8K_ORIGINALS_PARQUET [--urls 5000] [--rounds 3] [--enlarge 2]

Both download the same urls from a server on this machine: the originals over and over, one in fifty missing, spread
over 64 loopback addresses as hosts. Rounds alternate. `images_per_s` is of the whole command, its start included;
`steady` is of the time in which shards were being filled. `--enlarge 2` serves the originals, which are 500 pixels
long, at twice their size, as many pictures on the web are; its figures are called `download_large`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from PIL import Image
from record import record

HOSTS = 64
MISSING = 50  # one url in so many
IMAGE_SIZE = 256
SHARD = 500
PROCESSES = 2
THREADS = 32
BARE = f"""
import img2dataset, sys
if __name__ == "__main__":
    img2dataset.download(
        url_list=sys.argv[1], output_folder=sys.argv[2], input_format="parquet", url_col="url", caption_col="caption",
        save_additional_columns=["uid"], output_format="webdataset", image_size={IMAGE_SIZE}, resize_mode="keep_ratio",
        resize_only_if_bigger=True, encode_quality=95, extract_exif=False, compute_hash="sha256",
        processes_count={PROCESSES}, thread_count={THREADS}, number_sample_per_shard={SHARD}, enable_wandb=False)
"""


def enlarged(data: bytes, factor: int) -> bytes:
    """A JPEG at `factor` times its size."""
    if factor == 1:
        return data
    image = Image.open(io.BytesIO(data))
    stream = io.BytesIO()
    image.resize((image.width * factor, image.height * factor)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def serve(originals: Path, port: int, factor: int) -> None:
    """Answer /N.jpg with the N-th original, round and round; every fiftieth is missing."""
    images = [enlarged(data, factor) for data in pq.read_table(originals, columns=["image"])["image"].to_pylist()]

    async def answer(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        if number % MISSING == 0:
            return web.Response(status=404)
        return web.Response(body=images[number % len(images)], content_type="image/jpeg")

    application = web.Application()
    application.router.add_get(r"/{number:\d+}.jpg", answer)
    web.run_app(application, host="0.0.0.0", port=port, access_log=None, print=None, backlog=1024)


@contextlib.contextmanager
def serving(originals: Path, port: int, factor: int) -> Iterator[None]:
    """The server in a process of its own."""
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(originals, port, factor), daemon=True)
    server.start()
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        yield
    finally:
        server.kill()


def write_urls(path: Path, count: int, port: int) -> None:
    """A canonical list of `count` urls."""
    numbers = range(count)
    urls = [f"http://127.0.0.{2 + number % HOSTS}:{port}/{number}.jpg" for number in numbers]
    columns = {"uid": [f"{n}" for n in numbers], "url": urls, "caption": [f"picture {n}" for n in numbers]}
    pq.write_table(pa.table(columns), path)


def measure(command: list[str], urls: int, output: Path) -> tuple[float, float]:
    """Images/s of the whole command, and of the time between its first shard's start and its last one's end."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    start_s = time.perf_counter()
    subprocess.run(command, check=True, env=environment, capture_output=True, cwd=Path(__file__).resolve().parents[1])
    whole_s = time.perf_counter() - start_s
    shards = [json.loads(path.read_text()) for path in output.glob("*_stats.json")]
    assert sum(shard["successes"] for shard in shards) == urls - len(range(0, urls, MISSING))
    steady_s = max(shard["end_time"] for shard in shards) - min(shard["start_time"] for shard in shards)
    return urls / whole_s, urls / steady_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("originals", type=Path, metavar="PARQUET", help="files in a column `image`")
    parser.add_argument("--urls", type=int, default=5000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--enlarge", type=int, default=1, metavar="N")
    parser.add_argument("--port", type=int, default=8999)
    options = parser.parse_args()
    rates: dict[str, list[tuple[float, float]]] = {"img2dataset": [], "data_prep": []}
    with tempfile.TemporaryDirectory() as scratch, serving(options.originals, options.port, options.enlarge):
        folder = Path(scratch)
        write_urls(folder / "urls.parquet", options.urls, options.port)
        (folder / "bare.py").write_text(BARE)
        ours = [sys.executable, "-m", "data_prep", "download", f"{folder}/urls.parquet", "--allow-local"]
        ours += ["--samples-per-shard", f"{SHARD}", "--processes", f"{PROCESSES}", "--threads", f"{THREADS}"]
        ours += ["--image-size", f"{IMAGE_SIZE}"]
        for turn in range(options.rounds):
            commands = {
                "img2dataset": [sys.executable, f"{folder}/bare.py", f"{folder}/urls.parquet", f"{folder}/bare{turn}"],
                "data_prep": [*ours, "--output", f"{folder}/data_prep{turn}"],
            }
            for name, output in (("img2dataset", f"bare{turn}"), ("data_prep", f"data_prep{turn}")):
                rates[name].append(measure(commands[name], options.urls, folder / output))
                print(name, *(f"{rate:.0f}" for rate in rates[name][-1]), "images/s", flush=True)
    whole, steady = (
        [ours[index] / bare[index] for ours, bare in zip(rates["data_prep"], rates["img2dataset"], strict=True)]
        for index in (0, 1)
    )
    figures = {
        "images_per_s_over_img2dataset": round(statistics.median(whole), 3),
        "steady_over_img2dataset": round(statistics.median(steady), 3),
        "images_per_s": {name: round(statistics.median(rate for rate, _ in runs)) for name, runs in rates.items()},
        "steady_images_per_s": {name: round(statistics.median(r for _, r in runs)) for name, runs in rates.items()},
        "urls": options.urls,
    }
    print(json.dumps(figures, indent=2))
    command = f"python benchmarks/data_prep_download.py {options.originals.name} --urls {options.urls}"
    command += f" --enlarge {options.enlarge}"
    record("data_prep", figures, command, options.rounds, part="download" if options.enlarge == 1 else "download_large")


if __name__ == "__main__":
    main()
