"""What a download is to do: its settings, its list of urls, and the passes in which the urls are tried.

A directory has one pass over the whole list, then one for every `retry`; shards are numbered through all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import UserError
from formats.files import read_json_lines
from formats.manifest import PROVENANCE

# these decide what the shards hold and may not change between the runs of one download
FIXED = ("samples_per_shard", "image_size", "resize_mode", "blur_column", "accept_changed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to download. Limits per host are for the whole machine and are divided among the processes."""

    image_size: int = 256
    resize_mode: str = "keep_ratio"
    samples_per_shard: int = 10_000
    blur_column: str | None = None  # boxes to blur, see `boxes.read_boxes`
    accept_changed: bool = False  # keep images whose sha256 is not the one in the list

    distributor: str = "multiprocessing"
    processes: int = 1
    threads: int = 64  # requests at once, per process
    timeout_s: float = 10.0  # for one wait: a name, a connection, the next bytes
    deadline_s: float = 30.0  # for a whole request, redirects included
    min_bytes_per_s: int = 1000
    max_bytes: int = 20_000_000
    retries: int = 2
    host_connections: int = 20
    host_requests_per_s: float = 100.0
    nameservers: tuple[str, ...] = ()  # empty: those of the system
    proxies: tuple[tuple[str, str], ...] = ()  # (scheme, url) of each, see `addresses.read_proxies`
    contact: str | None = None
    allow_local: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Settings:
        """From its fields as JSON has them."""
        proxies = tuple((name, url) for name, url in fields["proxies"])
        return cls(**{**fields, "nameservers": tuple(fields["nameservers"]), "proxies": proxies})


@dataclasses.dataclass(frozen=True)
class Pass:
    """One round of trying: the whole list first, then what a `retry` chose. Shards are numbered through all passes."""

    attempt: int
    urls: Path
    rows: int
    classes: tuple[str, ...]  # what it chose from the passes before
    first_shard: int
    samples_per_shard: int
    share: tuple[int, int] = (0, 1)  # index and count: this process does every count-th shard, from the index on

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Pass:
        """From its fields as JSON has them."""
        index, count = fields["share"]
        return cls(
            **{**fields, "urls": Path(fields["urls"]), "classes": tuple(fields["classes"]), "share": (index, count)}
        )

    @property
    def shards(self) -> int:
        """How many shards this pass fills."""
        return math.ceil(self.rows / self.samples_per_shard)

    @property
    def numbers(self) -> range:
        """The shards that this process has to see to."""
        index, count = self.share
        return range(self.first_shard + index, self.first_shard + self.shards, count)

    def missing(self, directory: Path) -> list[int]:
        """Those that are not there yet."""
        return [number for number in self.numbers if not read_statistics(directory, number)]

    def rows_of(self, shard: int) -> tuple[int, int]:
        """The rows of the list that go into a shard: from, and up to but without."""
        start = (shard - self.first_shard) * self.samples_per_shard
        return start, min(self.rows, start + self.samples_per_shard)


def statistics_path(directory: Path, shard: int) -> Path:
    """A shard's statistics are written last: they say that it is whole."""
    return directory / f"{shard_name(shard)}_stats.json"


def read_statistics(directory: Path, shard: int) -> dict[str, Any]:
    """What `shard_worker` counted; empty when the shard is not there or was cut off in the writing."""
    try:
        statistics: dict[str, Any] = json.loads(statistics_path(directory, shard).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return statistics


def read_passes(directory: Path) -> list[Pass]:
    """All passes over a directory, from its provenance; empty when no download made it.

    Raises UserError when the provenance is not what a download writes.
    """
    passes: list[Pass] = []
    for line in read_json_lines(directory / PROVENANCE):
        if line.get("step") in ("download", "retry"):
            absent = [name for name in ("urls", "rows", "samples_per_shard") if name not in line]
            if absent:
                raise UserError(f"{directory / PROVENANCE} has a download without {', '.join(absent)}: mend that line")
            passes.append(
                Pass(
                    attempt=len(passes) + 1,
                    urls=directory / line["urls"],
                    rows=line["rows"],
                    classes=tuple(line.get("classes", ())),
                    first_shard=sum(before.shards for before in passes),
                    samples_per_shard=line["samples_per_shard"],
                )
            )
    return passes


def shard_name(number: int) -> str:
    """What the files of a shard are called, without their extension."""
    return f"{number:05d}"


def sample_key(shard: int, index: int, samples_per_shard: int) -> str:
    """The key of a sample, as img2dataset makes it."""
    digits = math.ceil(math.log10(samples_per_shard))
    return f"{shard * 10**digits + index:0{5 + digits}d}"


def list_files(urls: Path) -> list[Path]:
    """The files of a url list: itself, or in a folder its parts by name."""
    return sorted(urls.glob("*.parquet")) if urls.is_dir() else [urls]


def read_rows(urls: Path, start: int, stop: int) -> pa.Table:
    """Rows `start` to `stop` of a url list, reading the row groups that hold them and no more."""
    tables, first = [], 0
    for path in list_files(urls):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first < stop and first + count > start:
                skipped = max(0, start - first)
                tables.append(file.read_row_group(group).slice(skipped, min(stop, first + count) - first - skipped))
            first += count
    return pa.concat_tables(tables, promote_options="default")  # parts may differ in the order of their columns
