"""The ledger: what became of every url, one parquet beside each shard, and the passes in which urls were tried."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.shards.manifest import PROVENANCE
from data_prep.web.outcomes import DECODE, OK, TOO_LARGE
from formats.errors import UserError
from formats.files import read_json_lines, replacing

# columns that a url list brings along and that mean something else here: the published size and hash
LISTED_HASH = "listed_sha256"
_NOT_CARRIED = ("width", "height", "sha256", LISTED_HASH)
COLUMNS = pa.schema(
    {
        LISTED_HASH: pa.string(),
        "key": pa.string(),  # of the sample, unique in the directory
        "shard": pa.string(),
        "status": pa.string(),  # img2dataset's word for `class`
        "class": pa.string(),
        "error_message": pa.string(),
        "http_status": pa.int16(),
        "attempt": pa.int16(),  # 1: download, 2: first `retry`, …
        "tries": pa.int16(),  # requests in this attempt
        "elapsed_s": pa.float32(),  # of the last of them
        "bytes": pa.int64(),  # of the file on the web
        "sha256": pa.string(),  # likewise
        "width": pa.int32(),  # of the picture in the shard
        "height": pa.int32(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
    }
)


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
    return pa.concat_tables(tables)


def carried_columns(schema: pa.Schema) -> list[str]:
    """The columns of a url list that go into the ledger and into the samples' json."""
    return [name for name in schema.names if name not in _NOT_CARRIED and name not in COLUMNS.names]


def write_ledger(path: Path, listed: pa.Schema, rows: Sequence[dict[str, Any]]) -> None:
    """Write the outcomes of one shard's urls: the carried columns of its list, then `COLUMNS`."""
    fields = [listed.field(name) for name in carried_columns(listed)] + list(COLUMNS)
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(fields)), temporary, compression="zstd")


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


def count_outcomes(directory: Path) -> Counter[str]:
    """The last outcome of every url, counted by class."""
    passes = read_passes(directory)
    counts: Counter[str] = Counter()
    for one in passes:
        for shard in one.numbers:
            outcomes = read_statistics(directory, shard).get("outcomes", {})
            counts.update({name: count for name, count in outcomes.items() if _is_last(one, name, passes)})
    return +counts


def last_outcomes(directory: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The ledger shard by shard, without the rows that a later pass tried again."""
    passes = read_passes(directory)
    for one in passes:
        for shard in one.numbers:
            path = directory / f"{shard_name(shard)}.parquet"
            if path.exists():
                table = _read_ledger(path, [*columns, "class"] if columns else None)
                last = [name for name in pc.unique(table["class"]).to_pylist() if _is_last(one, name, passes)]
                yield table.filter(pc.is_in(table["class"], pa.array(last, pa.string())))


def _read_ledger(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        statistics = path.with_name(f"{path.stem}_stats.json").name
        raise UserError(
            f"{path} is damaged: delete {statistics}, and the same download makes its shard anew"
        ) from error


def img2dataset_status(outcome: str) -> str:
    """The word that img2dataset has for a class."""
    if outcome == OK:
        return "success"
    return "failed_to_resize" if outcome in (DECODE, TOO_LARGE) else "failed_to_download"


def _is_last(one: Pass, outcome: str, passes: Sequence[Pass]) -> bool:
    # a retry takes every url whose last outcome is of its classes: no url needs to be looked up
    return not any(outcome in later.classes for later in passes if later.attempt > one.attempt)


FORGOTTEN = "forgotten"
RETRY_LISTS = "retry_*.parquet"


def forget_rows(directory: Path, is_named: Callable[[str, Sequence[str]], bool]) -> int:
    """Blank the address, caption and hashes of rows that `is_named` (url, hashes); returns how many.

    In the ledgers of all shards, and in the lists of what a retry was to fetch. The row itself stays, so that counts
    still add up; it is never tried again.
    """
    blanked = 0
    for path in (*sorted(directory.glob("[0-9]*.parquet")), *sorted(directory.glob(RETRY_LISTS))):
        table = _read_ledger(path)
        if "url" not in table.column_names:
            continue
        hash_columns = [name for name in ("sha256", LISTED_HASH) if name in table.column_names]
        rows = table.select(["url", *hash_columns]).to_pylist()
        named = [is_named(row["url"], [row[name] for name in hash_columns if row[name]]) for row in rows]
        if any(named):
            with replacing(path) as temporary:
                pq.write_table(_blank(table, pa.array(named), hash_columns), temporary, compression="zstd")
            blanked += sum(named)
    return blanked


def _blank(table: pa.Table, named: pa.Array, hash_columns: Sequence[str]) -> pa.Table:
    blanks: dict[str, str | None] = {"url": "", "caption": "", **dict.fromkeys(hash_columns)}
    if "error_message" in table.column_names:
        blanks["error_message"] = FORGOTTEN
    for name, blank in blanks.items():
        if name in table.column_names:
            column = pc.if_else(named, pa.scalar(blank, table.schema.field(name).type), table[name])
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    return table
