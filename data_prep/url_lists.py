"""Reading url lists as they are published: TSV, parquet, CSV and JSON lines, one record batch at a time.

Every reader yields `Chunk`s whose table has the columns `url` and `caption`, and those of `CARRIED` that the
list has, all still in the list's own types. Memory is bounded by one block, whatever the size of the file.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_prep.console import nearest
from data_prep.errors import UserError

BLOCK_BYTES = 1 << 20  # also the longest line that a TSV or CSV list may have
ROWS_PER_CHUNK = 50_000

URL_NAMES = ("url", "image_url", "imageurl", "link")
CAPTION_NAMES = ("caption", "text", "alt_text", "title", "description")
# canonical column -> the names that published lists give it (compared in lower case)
CARRIED: Mapping[str, Sequence[str]] = {
    "uid": ("uid",),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "sha256": ("sha256",),
    "similarity": ("similarity", "clip_l14_similarity_score"),
    "punsafe": ("punsafe",),
}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a url list, the lines that could not be parsed into it, and how far the file is read."""

    table: pa.Table
    malformed: int
    fraction_done: float


@dataclasses.dataclass(frozen=True)
class ColumnChoice:
    """The user's names for the url and caption columns; None means: find them by their usual names."""

    url: str | None = None
    caption: str | None = None


Reader = Callable[[BinaryIO, int, ColumnChoice], Iterator[Chunk]]


def read_caption_url_tsv(stream: BinaryIO, size_bytes: int, choice: ColumnChoice) -> Iterator[Chunk]:
    """CC3M: no header, caption TAB url."""
    return _read_tsv(stream, size_bytes, ["caption", "url"], choice)


def read_url_caption_tsv(stream: BinaryIO, size_bytes: int, choice: ColumnChoice) -> Iterator[Chunk]:
    """CC12M: no header, url TAB caption."""
    return _read_tsv(stream, size_bytes, ["url", "caption"], choice)


def _read_tsv(stream: BinaryIO, size_bytes: int, columns: list[str], choice: ColumnChoice) -> Iterator[Chunk]:
    if choice != ColumnChoice():
        raise UserError("a TSV list has no header: drop --url-column/--caption-column, or make it a CSV")
    malformed = 0

    def skip_and_count(_: pa_csv.InvalidRow) -> str:
        nonlocal malformed
        malformed += 1
        return "skip"

    reader = pa_csv.open_csv(
        stream,
        pa_csv.ReadOptions(column_names=columns, block_size=BLOCK_BYTES),
        pa_csv.ParseOptions(delimiter="\t", quote_char=False, escape_char=False, invalid_row_handler=skip_and_count),
        # binary: a line that is not UTF-8 costs itself, not its block
        pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.binary()), strings_can_be_null=False),
    )
    bytes_read = 0
    for batch in reader:
        # the stream itself is blocks ahead: what was parsed is the text of the lines, less Arrow's offsets
        bytes_read += batch.nbytes - 6 * batch.num_rows
        yield Chunk(pa.Table.from_batches([batch]), malformed, min(bytes_read / max(size_bytes, 1), 1.0))
        malformed = 0
    if malformed:
        yield Chunk(reader.schema.empty_table(), malformed, 1.0)


def read_csv(stream: BinaryIO, size_bytes: int, choice: ColumnChoice) -> Iterator[Chunk]:
    """Comma-separated with a header line; quoted fields may hold commas and line breaks."""
    lines = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(line.replace("\0", "") for line in lines)
    header = next(rows, [])
    columns = find_columns(header, choice)
    indices = {name: header.index(source) for name, source in columns.items()}

    def records() -> Iterator[dict[str, Any] | None]:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield None
                continue
            if row:
                well_formed = len(row) == len(header)
                yield {name: row[index] for name, index in indices.items()} if well_formed else None

    yield from _chunks(records(), list(indices), lambda: _position(stream, size_bytes))


def read_json_lines(stream: BinaryIO, size_bytes: int, choice: ColumnChoice) -> Iterator[Chunk]:
    """One JSON object per line; the first one's names decide which columns there are."""
    columns: dict[str, str] = {}

    def records() -> Iterator[dict[str, Any] | None]:
        for line in stream:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                yield None
                continue
            if not isinstance(value, dict):
                yield None
                continue
            if not columns:
                columns.update(find_columns(list(value), choice))
            yield {name: _text(value.get(source)) for name, source in columns.items()}

    yield from _chunks(records(), ["url", "caption", *CARRIED], lambda: _position(stream, size_bytes))


def read_parquet(stream: BinaryIO, size_bytes: int, choice: ColumnChoice) -> Iterator[Chunk]:
    """LAION, DataComp and every other parquet that has a url and a caption column."""
    try:
        file = pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"not a readable parquet file: {error}") from error
    columns = find_columns(file.schema_arrow.names, choice)
    rows_read = 0
    for batch in file.iter_batches(ROWS_PER_CHUNK, columns=list(columns.values())):
        rows_read += batch.num_rows
        table = pa.table({name: batch.column(source) for name, source in columns.items()})
        yield Chunk(table, 0, rows_read / max(file.metadata.num_rows, 1))


def find_columns(names: Sequence[str], choice: ColumnChoice) -> dict[str, str]:
    """Canonical name -> the list's own name, for the url, the caption and the carried columns present.

    Raises UserError when the url or caption column is not among `names`.
    """
    lower = {name.lower(): name for name in reversed(names)}
    columns = {
        "url": _required(names, lower, choice.url, URL_NAMES, "--url-column"),
        "caption": _required(names, lower, choice.caption, CAPTION_NAMES, "--caption-column"),
    }
    for canonical, aliases in CARRIED.items():
        found = next((lower[alias] for alias in aliases if alias in lower), None)
        if found is not None and found not in columns.values():
            columns[canonical] = found
    return columns


def _required(
    names: Sequence[str], lower: Mapping[str, str], chosen: str | None, usual: Sequence[str], flag: str
) -> str:
    if chosen is not None:
        if chosen not in names:
            raise UserError(f"no column {chosen!r}{nearest(chosen, names)}")
        return chosen
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None:
        raise UserError(f"no column named {' or '.join(usual)}: name it with {flag}{nearest(usual[0], names)}")
    return found


def _chunks(
    records: Iterator[dict[str, Any] | None], columns: Sequence[str], position: Callable[[], float]
) -> Iterator[Chunk]:
    """Gather parsed records (None: a malformed line) into tables of text columns."""
    rows: list[dict[str, Any]] = []
    malformed = 0
    for record in records:
        if record is None:
            malformed += 1
        else:
            rows.append(record)
        if len(rows) == ROWS_PER_CHUNK:
            yield Chunk(_table(rows, columns), malformed, position())
            rows, malformed = [], 0
    if rows or malformed:
        yield Chunk(_table(rows, columns), malformed, 1.0)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pa.Table:
    present = [name for name in columns if name in ("url", "caption") or any(name in row for row in rows)]
    return pa.table({name: pa.array([_bytes(row.get(name)) for row in rows], pa.binary()) for name in present})


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _bytes(value: str | None) -> bytes | None:
    # surrogateescape gives an undecodable byte back as it was, surrogatepass a lone JSON \ud800: neither is UTF-8
    try:
        return None if value is None else value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"\xff"


def _position(stream: BinaryIO, size_bytes: int) -> float:
    return min(stream.tell() / max(size_bytes, 1), 1.0)
