"""Reading tables as people write them: TSV, CSV, JSON lines, JSON files and parquet, from any stream.

Every row is given or refused with a reason: nothing is lost unsaid. A row that does not fit costs itself, never the
rows after it. `read_chunks` gives Arrow tables, which is fast; `read_rows` gives Python values one row at a time. Both
take the columns to read as a mapping from the name that the caller uses to the table's own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_prep.tables.json_tables import read_coco_json, read_json, read_json_lines, read_sbu_json
from data_prep.tables.lines import (
    EXAMPLE_CHARS,
    OVERLONG,
    CsvRecords,
    Range,
    Refused,
    Row,
    blocks_of_lines,
    lines,
    malformed,
)
from formats.errors import UserError

ROWS_PER_CHUNK = 50_000
ROWS_PER_BATCH = 256  # of parquet, where rows hold pictures
NOT_UTF8 = "not UTF-8"
TEXT_COLUMNS = ("url", "caption")

NO_TEXT = Refused(NOT_UTF8, "")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows of a table, texts as bytes, and those that were refused."""

    table: pa.Table
    refused: Sequence[Refused] = ()


Reader = Callable[[BinaryIO, Range, Sequence[str], Mapping[str, str]], Iterator[Any]]


def read_chunks(
    kind: str, stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Chunk]:
    """Rows of a table of `kind`, a key of `CHUNK_READERS` or `ROW_READERS`, whose columns are called `names`.

    Raises UserError for a file that is not of its kind.
    """
    if kind in CHUNK_READERS:
        return CHUNK_READERS[kind](stream, part, names, columns)
    return _chunks(ROW_READERS[kind](stream, part, names, columns), list(columns))


def read_rows(
    kind: str, stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Row | Refused]:
    """The same one by one, as Python values: texts are str, and only parquet gives bytes."""
    if kind in ROW_READERS:
        records = ROW_READERS[kind](stream, part, names, columns)
    elif kind == "parquet":
        records = _records(_read_parquet(stream, part, columns, ROWS_PER_BATCH))
    else:
        records = _records(CHUNK_READERS[kind](stream, part, names, columns))
    for record in records:
        if isinstance(record, Refused):
            yield record
            continue
        try:
            yield record if kind == "parquet" else {name: _as_text(value) for name, value in record.items()}
        except UnicodeError:
            yield NO_TEXT


def _as_text(value: Any) -> Any:
    """Bytes as text, anything else as it is. Raises UnicodeError for bytes, or a str of JSON, that are not UTF-8."""
    if isinstance(value, str):
        value.encode()
    return value.decode() if isinstance(value, bytes) else value


def _records(chunks: Iterable[Chunk]) -> Iterator[Row | Refused]:
    for chunk in chunks:
        yield from chunk.refused
        try:
            yield from chunk.table.to_pylist()
        except UnicodeDecodeError:  # what parquet calls text need not be UTF-8
            for row in range(chunk.table.num_rows):
                try:
                    yield chunk.table.slice(row, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield NO_TEXT


def is_text(kind: pa.DataType) -> bool:
    """Whether a column may hold text: strings and bytes of any width, dictionaries of them, nothing but nulls."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_null,
    )
    return any(check(kind) for check in checks)


def as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of text as bytes: what a file calls text need not be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary() if pa.types.is_large_binary(column.type) else pa.binary())


def read_tsv(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Lines of fields with tabs between them, without quoting."""
    for block, overlong in blocks_of_lines(stream, part.start, part.stop):
        # Arrow takes a carriage return for the end of a line; between line feeds it is a character like others
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").removesuffix(b"\r").replace(b"\r", b" ")
        block, refused = _split_malformed(block, len(names))
        refused += [malformed(OVERLONG)] * overlong
        if not block:
            yield Chunk(_table([], list(columns)), refused)
            continue
        table = pa_csv.read_csv(
            pa.BufferReader(block),
            pa_csv.ReadOptions(column_names=list(names), block_size=len(block) + 1, use_threads=False),
            pa_csv.ParseOptions(delimiter="\t", quote_char=False, escape_char=False),
            # binary: a line that is not UTF-8 costs itself, not its block
            pa_csv.ConvertOptions(
                include_columns=list(columns.values()),
                column_types=dict.fromkeys(names, pa.binary()),
                strings_can_be_null=False,
            ),
        )
        yield Chunk(table.rename_columns(list(columns)), refused)


def _split_malformed(block: bytes, fields: int) -> tuple[bytes, list[Refused]]:
    """The lines with the right number of fields, and the others. (Arrow's own handler fails on what is not UTF-8.)"""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    starts = np.concatenate([[0], ends[:-1] + 1])
    tabs = np.searchsorted(np.flatnonzero(data == ord("\t")), ends)
    bad = (np.diff(tabs, prepend=0) != fields - 1) & (ends > starts)
    if not bad.any():
        return block, []
    refused = [
        malformed(block[start : min(end, start + EXAMPLE_CHARS)])
        for start, end in zip(starts[bad].tolist(), ends[bad].tolist(), strict=True)
    ]
    good_bytes = np.repeat(~bad, ends + 1 - starts)[: len(block)]
    return data[good_bytes].tobytes(), refused


def read_csv(
    stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Row | Refused]:
    """Fields with commas between them; quoted ones may hold commas, line breaks and, doubled, quotes."""
    indices = {name: names.index(source) for name, source in columns.items()}
    for raw, fields in CsvRecords(lines(stream, part.start), len(names)):
        yield malformed(raw) if fields is None else {name: fields[index] for name, index in indices.items()}


def read_parquet(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Row groups of a parquet file."""
    return _read_parquet(stream, part, columns, ROWS_PER_CHUNK)


def _read_parquet(stream: BinaryIO, part: Range, columns: Mapping[str, str], rows: int) -> Iterator[Chunk]:
    file = pq.ParquetFile(stream)
    groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
    for batch in file.iter_batches(rows, list(groups), columns=list(columns.values()), use_threads=False):
        if not set(columns.values()) <= set(batch.schema.names):
            raise UserError("its columns are not those that its footer names: the file is damaged")
        yield Chunk(pa.table({name: batch.column(source) for name, source in columns.items()}))


CHUNK_READERS: Mapping[str, Reader] = {"tsv": read_tsv, "parquet": read_parquet}
ROW_READERS: Mapping[str, Reader] = {
    "csv": read_csv,
    "jsonl": read_json_lines,
    "json": read_json,
    "sbu-json": read_sbu_json,
    "coco-json": read_coco_json,
}


def _chunks(records: Iterable[Row | Refused], columns: Sequence[str]) -> Iterator[Chunk]:
    """Gather records into tables of text columns."""
    rows: list[Row] = []
    refused: list[Refused] = []
    for record in records:
        if isinstance(record, Refused):
            refused.append(record)
        elif no_text := next((name for name in TEXT_COLUMNS if _is_no_text(record.get(name))), None):
            refused.append(Refused(f"{no_text} is no text", json.dumps(record[no_text])[:EXAMPLE_CHARS]))
        else:
            rows.append(record)
        if len(rows) + len(refused) == ROWS_PER_CHUNK:
            yield Chunk(_table(rows, columns), refused)
            rows, refused = [], []
    if rows or refused:
        yield Chunk(_table(rows, columns), refused)


def _is_no_text(value: object) -> bool:
    """A truth value, a list or an object of JSON; a number can be read as text."""
    return isinstance(value, bool | list | dict)


def _table(rows: Sequence[Row], columns: Sequence[str]) -> pa.Table:
    values = {name: [_bytes(row.get(name), name in TEXT_COLUMNS) for row in rows] for name in columns}
    return pa.table({name: pa.array(column, pa.binary()) for name, column in values.items()})


def _bytes(value: object, is_text: bool = False) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if is_text and value != value:  # NaN stands for nothing
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    # surrogateescape gives an undecodable byte back as it was, surrogatepass a lone JSON \ud800: neither is UTF-8
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"\xff"
