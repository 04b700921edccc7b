"""Fill one shard: fetch its urls, bring the images into form, write tar, ledger and statistics.

This stands where img2dataset has its Downloader: an object that its distributors send to their workers and call with
(number, where the rows are), and that answers (done, the same again).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import functools
import hashlib
import random
import resource
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import cv2
import pyarrow as pa

from data_prep.boxes import read_boxes
from data_prep.shards.writer import TarWriter
from data_prep.web.http_client import HttpClient
from data_prep.web.in_hand import FATAL, SUFFIX, InHand
from data_prep.web.ledger import (
    DECODE,
    FORGOTTEN,
    HASH,
    LISTED_HASH,
    OK,
    OTHER,
    FetchError,
    carried_columns,
    img2dataset_status,
    write_ledger,
)
from data_prep.web.passes import Pass, Settings, read_rows, sample_key, shard_name, statistics_path
from data_prep.web.web_image import WebImage, to_jpeg
from formats.files import flush_to_disk, replacing, to_json, write_json

Row: TypeAlias = dict[str, Any]
Task: TypeAlias = tuple[int, tuple[int, int]]  # shard, its rows of the list

BACK_OFF_S = 0.5  # before the second try; doubled for each further one
MAX_BACK_OFF_S = 60.0
PROGRESS_S = 1.0
PROGRESS_DIRECTORY = "_tmp"
DEFECT = "defect: "  # before what no rerun can mend


@dataclasses.dataclass(frozen=True)
class ShardWorker:
    """Fills shards of one pass in `directory`."""

    directory: Path
    one: Pass
    settings: Settings

    def __call__(self, task: Task) -> tuple[bool, Task]:
        """Fill one shard; False when it could not be written, the reason being on standard output."""
        shard, (start, stop) = task
        cv2.setNumThreads(1)
        try:
            table = read_rows(self.one.urls, start, stop)
            loop, client = _network(self.settings)
            with _Shard(self.directory, shard, self.one, table) as output:
                loop.run_until_complete(_fill(output, table, client, self.settings))
            client.forget_oldest()
        except (OSError, MemoryError) as error:  # a full disk, for one: somebody can help
            traceback.print_exc()
            print(f"error: shard {shard}: {type(error).__name__}: {error}", flush=True)
            return False, task
        except Exception as error:
            traceback.print_exc()
            print(f"{DEFECT}shard {shard}: {type(error).__name__}: {error}", flush=True)
            return False, task
        return True, task


@functools.lru_cache(maxsize=1)
def _network(settings: Settings) -> tuple[asyncio.AbstractEventLoop, HttpClient]:
    """This process's event loop and client: what they know of names and hosts serves one shard after the other."""
    _raise_descriptor_limit()
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(_make_client(settings))
    atexit.register(lambda: loop.run_until_complete(client.close()))
    return loop, client


async def _make_client(settings: Settings) -> HttpClient:
    return HttpClient(settings)


def _raise_descriptor_limit() -> None:
    """Allow this process as many open files as the system lets it have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit that they do not name
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Shard:
    """The files of a shard in the making; nothing has its final name before all is written."""

    def __init__(self, directory: Path, shard: int, one: Pass, listed: pa.Table) -> None:
        self.counts: Counter[str] = Counter()
        self._directory = directory
        self._shard = shard
        self._one = one
        self._listed = listed
        self._carried = carried_columns(listed.schema)
        self._ledger: dict[int, Row] = {}
        self._start_s = time.time()
        self._resources = contextlib.ExitStack()
        part = self._resources.enter_context(replacing(directory / f"{shard_name(shard)}.tar"))
        self._tar = self._resources.enter_context(TarWriter(part))
        self.in_hand = self._resources.enter_context(InHand(_in_hand_path(directory, shard)))

    def __enter__(self) -> _Shard:
        return self

    def add(self, index: int, row: Row, outcome: Row, image: WebImage | None) -> None:
        """Note what became of a url, and store the image where there is one."""
        key = sample_key(self._shard, index, self._one.samples_per_shard)
        entry: Row = {
            LISTED_HASH: row.get("sha256"),
            "key": key,
            "shard": f"{shard_name(self._shard)}.tar",
            "status": img2dataset_status(outcome["class"]),
            "attempt": self._one.attempt,
            **outcome,
        }
        if image is not None:
            entry |= {name: value for name, value in dataclasses.asdict(image).items() if name != "data"}
            described = {name: row[name] for name in self._carried} | entry
            known = {name: value for name, value in described.items() if value is not None}
            members = {
                "jpg": image.data,
                "txt": row["caption"].replace("\0", " ").encode(),
                "json": to_json(known, default=str).encode(),
            }
            self._tar.write(key, members)
        self._ledger[index] = entry
        self.counts[outcome["class"]] += 1

    def write_progress(self) -> None:
        """Say how far this shard is; the reader leaves out one that is half written."""
        progress_path(self._directory, self._shard).write_text(to_json(self.counts), encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)
        if kind is None:
            rows = [row for _, row in sorted(self._ledger.items())]
            write_ledger(self._directory / f"{shard_name(self._shard)}.parquet", self._listed, rows)
            flush_to_disk(self._directory)  # or after a power loss the statistics could speak of files without a name
            write_json(statistics_path(self._directory, self._shard), self._statistics())
            _in_hand_path(self._directory, self._shard).unlink(missing_ok=True)

    def _statistics(self) -> Row:
        """As img2dataset writes them, and the classes."""
        by_status: Counter[str] = Counter()
        for outcome, count in self.counts.items():
            by_status[img2dataset_status(outcome)] += count
        end_s = time.time()
        return {
            "count": self.counts.total(),
            "successes": by_status["success"],
            "failed_to_download": by_status["failed_to_download"],
            "failed_to_resize": by_status["failed_to_resize"],
            "duration": end_s - self._start_s,
            "start_time": self._start_s,
            "end_time": end_s,
            "outcomes": dict(self.counts),
        }


def progress_path(directory: Path, shard: int) -> Path:
    """The outcomes so far of a shard in the making; whoever counts the finished shard deletes it."""
    return directory / PROGRESS_DIRECTORY / f"{shard_name(shard)}.json"


def _in_hand_path(directory: Path, shard: int) -> Path:
    return directory / PROGRESS_DIRECTORY / f"{shard_name(shard)}{SUFFIX}"


def shards_under_way(directory: Path) -> list[int]:
    """The shards that have such a file."""
    return [int(path.stem) for path in (directory / PROGRESS_DIRECTORY).glob("[0-9]*.json")]


async def _fill(output: _Shard, table: pa.Table, client: HttpClient, settings: Settings) -> None:
    # one decoder: the network is waited for meanwhile, and one large picture at a time is in memory
    with ThreadPoolExecutor(1) as decoder:
        tasks = [
            asyncio.ensure_future(_one_url(output, index, row, client, decoder, settings))
            for index, row in enumerate(_rows_of(table))
        ]
        reporter = asyncio.ensure_future(_report_progress(output))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, reporter):
                task.cancel()
            await asyncio.gather(*tasks, reporter, return_exceptions=True)


def _rows_of(table: pa.Table) -> list[Row]:
    try:
        rows: list[Row] = table.to_pylist()
    except (ValueError, OverflowError):  # times that Python cannot say
        text = [field.with_type(pa.string()) if pa.types.is_temporal(field.type) else field for field in table.schema]
        rows = table.cast(pa.schema(text)).to_pylist()
    return rows


async def _report_progress(output: _Shard) -> None:
    while True:
        output.write_progress()
        await asyncio.sleep(PROGRESS_S)


async def _one_url(
    output: _Shard, index: int, row: Row, client: HttpClient, decoder: ThreadPoolExecutor, settings: Settings
) -> None:
    for tries in range(1, settings.retries + 2):
        outcome, image, error = await _try_once(output.in_hand, index, row, client, decoder, settings)
        wait_s = _back_off_s(error, tries) if error else 0.0
        if error is None or not error.retryable or tries > settings.retries or wait_s > MAX_BACK_OFF_S:
            output.add(index, row, {**outcome, "tries": tries}, image)
            return
        await asyncio.sleep(wait_s)


async def _try_once(
    in_hand: InHand, index: int, row: Row, client: HttpClient, decoder: ThreadPoolExecutor, settings: Settings
) -> tuple[Row, WebImage | None, FetchError | None]:
    """The ledger's columns, and the image or why there is none."""
    outcome: Row = {}
    try:
        if not row["url"]:
            raise FetchError(FORGOTTEN, FORGOTTEN)
        if in_hand.is_fatal(index):
            raise FetchError(DECODE, f"the process that decoded it was killed, {FATAL} times")
        async with client.image(row["url"]) as body:
            outcome = {"bytes": len(body.data), "http_status": body.http_status, "elapsed_s": body.elapsed_s}
            loop = asyncio.get_running_loop()
            outcome["sha256"], image = await loop.run_in_executor(
                decoder, _finish, in_hand, index, body.data, row, settings
            )
        return {**outcome, "class": OK}, image, None
    except FetchError as error:
        failure = error
    except Exception as error:  # whatever a stranger sends, it must not cost more than its own url
        failure = FetchError(OTHER, f"{type(error).__name__}: {str(error)[:200]}")
    known = {"http_status": failure.http_status, "elapsed_s": failure.elapsed_s}
    return {**known, **outcome, "class": failure.outcome, "error_message": failure.message}, None, failure


def _back_off_s(error: FetchError, tries: int) -> float:
    """When to try again: when the server says, or ever later, and not all at once."""
    own_s: float = BACK_OFF_S * 2 ** (tries - 1) * random.uniform(1.0, 1.5)
    return max(own_s, error.retry_after_s or 0.0)


def _finish(in_hand: InHand, index: int, data: bytes, row: Row, settings: Settings) -> tuple[str, WebImage]:
    """The file's sha256 and the JPEG for the shard."""
    digest = hashlib.sha256(data).hexdigest()
    listed = row.get("sha256")
    if listed and listed.lower() != digest and not settings.accept_changed:
        raise FetchError(HASH, f"sha256 {digest}")
    boxes = read_boxes(row[settings.blur_column]) if settings.blur_column else ()
    with in_hand.holding(index):
        return digest, to_jpeg(data, settings.image_size, settings.resize_mode, boxes)
