"""A piece of a url list -> canonical rows in Arrow files, cleaned, filtered, each refused row counted by its reason.

A finished piece is a JSON file in the work folder, named by a digest of all that decides its rows. So a restart or
another array job finds what is done, and a change of options or of a list finds nothing that does not fit. Beside the
rows stand the sorted digests of their keys, by which duplicates are found.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.folders import Folder
from data_prep.lists.cleaning import BLANK, BOXES, boxes, canonical_urls, clean_captions, numbers
from data_prep.lists.exact_duplicates import KEYS, Digests, pair_digests, sorted_records
from data_prep.lists.filters import Filters, conditions
from data_prep.lists.list_files import ListFormat, Piece
from data_prep.tables.files import naming
from data_prep.tables.lines import EXAMPLE_CHARS
from data_prep.tables.readers import NOT_UTF8, Chunk, as_bytes, is_text
from formats.errors import UserError, nearest_of

FORMAT_VERSION = 2  # of the work folder; raise it when the same options would give other rows
ROWS_PER_PART = 1_000_000
UID_HEX_DIGITS = 32
SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "url": pa.string(),
        "caption": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "sha256": pa.string(),
        "similarity": pa.float32(),
        "punsafe": pa.float32(),
        "aesthetic": pa.float32(),
        "watermark": pa.float32(),
        "language": pa.string(),
        "face_bboxes": BOXES,
    }
)
EXAMPLES_PER_REASON = 5  # of every piece of a list
NO_NUMBER, NO_BOXES = "{} is no number", "face_bboxes are no boxes"


@dataclasses.dataclass
class Rejects:
    """How many rows were refused for which reason, and a few of each to read."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    emptied: Counter[str] = dataclasses.field(default_factory=Counter)  # values of rows that stay, left out as unusable

    def add(self, reason: str, table: pa.Table) -> None:
        """Count the rows of a table with `url` and `caption`."""
        room = max(EXAMPLES_PER_REASON - self.counts[reason], 0)
        self.counts[reason] += table.num_rows
        for row in table.slice(0, room).select(["url", "caption"]).to_pylist():
            self.examples.append({"reason": reason} | {name: _readable(value) for name, value in row.items()})

    def add_refused(self, chunk: Chunk) -> None:
        """Count the rows of a chunk that could not be read."""
        for refused in chunk.refused:
            self.counts[refused.reason] += 1
            if self.counts[refused.reason] <= EXAMPLES_PER_REASON:
                self.examples.append({"reason": refused.reason, "line": refused.text})


def canonicalise(table: pa.Table, filters: Filters, rejects: Rejects) -> pa.Table:
    """Bring a chunk of a url list into `SCHEMA`; rows that cannot or shall not be used go into `rejects`."""
    table = _only_utf8(table, rejects)
    urls = pc.utf8_trim_whitespace(pc.fill_null(table["url"], ""))
    cleaned = _replaced(table, "url", canonical_urls(urls))
    cleaned = _replaced(cleaned, "caption", clean_captions(table["caption"]))
    canonical, unusable = _typed(cleaned)
    usable = pa.chunked_array([np.ones(table.num_rows, np.bool_)])
    for reason, passes in _conditions(urls, canonical, unusable, filters):
        refused = pc.and_not(usable, pc.fill_null(passes, False))
        if pc.any(refused).as_py():
            rejects.add(reason, table.filter(refused))
            usable = pc.and_not(usable, refused)
    for problem, rows in unusable.items():
        rejects.emptied[problem] += pc.sum(pc.and_(rows, usable)).as_py() or 0
    if not pc.all(usable, min_count=0).as_py():
        canonical = canonical.filter(usable)
    return _replaced(canonical, "uid", _uids(canonical))


def _conditions(
    urls: pa.ChunkedArray, canonical: pa.Table, unusable: Mapping[str, pa.ChunkedArray], filters: Filters
) -> Iterator[tuple[str, pa.ChunkedArray]]:
    if canonical["url"].null_count:
        yield "no url", pc.not_equal(urls, "")
        yield "url not http(s)", pc.match_substring_regex(urls, r"^(?i:https?):")
        yield "malformed url", pc.is_valid(canonical["url"])
    yield "no caption", pc.invert(pc.match_substring_regex(canonical["caption"], BLANK))
    if NO_BOXES in unusable:  # faces that were to be blurred would not be
        yield NO_BOXES, pc.invert(unusable[NO_BOXES])
    yield from conditions(canonical, filters)


def _typed(table: pa.Table) -> tuple[pa.Table, dict[str, pa.ChunkedArray]]:
    """All columns of `SCHEMA`, null where the list has nothing; and by problem the rows with an unusable value."""
    columns: dict[str, pa.ChunkedArray] = {}
    unusable: dict[str, pa.ChunkedArray] = {}
    for field in SCHEMA:
        absent = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        column = table[field.name] if field.name in table.column_names else absent
        if field.type == BOXES:
            columns[field.name], bad = boxes(column)
            unusable[NO_BOXES] = bad
        elif pa.types.is_string(field.type):
            nested = pa.types.is_nested(column.type)
            columns[field.name] = absent if nested else column.cast(field.type)
            if nested:
                unusable[f"{field.name} is no text"] = pc.is_valid(column)
        else:
            columns[field.name], unusable[NO_NUMBER.format(field.name)] = numbers(column, field.type)
    return pa.table(columns, schema=SCHEMA), {
        problem: rows for problem, rows in unusable.items() if pc.any(rows).as_py()
    }


def _uids(table: pa.Table) -> pa.ChunkedArray:
    given = pc.fill_null(table["uid"], "")
    if pc.all(pc.not_equal(given, ""), min_count=0).as_py():
        return given
    text = pair_digests(table).tobytes().hex().encode()
    offsets = np.arange(0, len(text) + 1, UID_HEX_DIGITS, dtype=np.int32)
    made = pa.chunked_array([pa.StringArray.from_buffers(table.num_rows, pa.py_buffer(offsets), pa.py_buffer(text))])
    return made if table["uid"].null_count == table.num_rows else pc.if_else(pc.equal(given, ""), made, given)


def _replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _only_utf8(table: pa.Table, rejects: Rejects) -> pa.Table:
    """Cast binary columns, and captions that are numbers, to text; rows that are not UTF-8 are refused."""
    if not is_text(table["caption"].type):
        table = _replaced(table, "caption", table["caption"].cast(pa.string()))
    text_columns = [field.name for field in table.schema if is_text(field.type)]
    for name in text_columns:
        table = _replaced(table, name, as_bytes(table[name]))
    texts = pa.schema([field.with_type(pa.string()) if field.name in text_columns else field for field in table.schema])
    try:
        return table.cast(texts)
    except pa.ArrowInvalid:
        keep = [True] * table.num_rows
        for name in text_columns:
            keep = [kept and _is_utf8(value) for kept, value in zip(keep, table[name].to_pylist(), strict=True)]
        rejects.add(NOT_UTF8, table.filter(pc.invert(pa.array(keep))))
        return table.filter(pa.array(keep)).cast(texts)


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _readable(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
    return text[:EXAMPLE_CHARS]


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the rows that ingest writes. `unique`: keys of `KEYS` of which every value may occur once."""

    list_format: ListFormat = dataclasses.field(default_factory=ListFormat)
    filters: Filters = dataclasses.field(default_factory=Filters)
    unique: tuple[str, ...] = ("url",)


@dataclasses.dataclass(frozen=True)
class Part:
    """Canonical rows of a piece: files NAME.arrow and, for each unique key, NAME.KEY with sorted digests."""

    name: str
    rows: int
    buckets: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class PieceResult:
    """What came of one piece."""

    path: str
    read: int
    rejected: dict[str, int]
    emptied: dict[str, int]
    examples: list[dict[str, Any]]
    parts: list[Part]


def piece_name(piece: Piece, options: Options) -> str:
    """The name of the piece's files: another one whenever its rows or digests could differ."""
    text = f"{FORMAT_VERSION} {piece.identity()} {options.filters.identity()} {sorted(options.unique)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def result_file(piece: Piece, options: Options) -> str:
    """The file in the work folder that says that a piece is done."""
    return piece_name(piece, options) + ".json"


def ingest_piece(piece: Piece, options: Options, work: str) -> str:
    """Read, clean and filter one piece into the work folder; returns its result's name. Raises UserError."""
    folder, name = Folder(work), piece_name(piece, options)
    rejects = Rejects()
    rows_read = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal rows_read
        for chunk in piece.read():
            rows_read += len(chunk.refused) + chunk.table.num_rows
            rejects.add_refused(chunk)
            with naming(piece.path):
                table = canonicalise(chunk.table, options.filters, rejects)
            yield table

    parts = list(_write_parts(folder, name, tables(), options.unique))
    examples = [{"list": piece.path, **example} for example in rejects.examples]
    result = PieceResult(piece.path, rows_read, dict(+rejects.counts), dict(rejects.emptied), examples, parts)
    folder.write_json(f"{name}.json", dataclasses.asdict(result))
    return f"{name}.json"


def check_columns(piece: Piece, filters: Filters) -> None:
    """Raise UserError for a limit on a column that the list lacks, or in whose first rows nothing can be read."""
    limits = filters.columns()
    with naming(piece.path):
        for column, flag in limits.items():
            if column not in piece.columns:
                raise UserError(f"{flag} needs a column {column}{nearest_of(column, tuple(piece.columns))}")
        chunk = next(piece.read(), None) if limits else None
        if chunk is None:
            return
        rejects = Rejects()
        table = canonicalise(chunk.table, Filters(), rejects)
        for column, flag in limits.items():
            values = pc.drop_null(table[column])
            kind, given = "numbers", len(values) + rejects.emptied[NO_NUMBER.format(column)]
            if column == "sha256":
                kind, values = "hashes", values.filter(pc.match_substring_regex(values, "^[0-9a-fA-F]{64}$"))
            if given and not len(values):
                raise UserError(
                    f"{flag} needs {kind}: the first rows have none in the column {piece.columns[column]!r}"
                )


def read_result(folder: Folder, name: str) -> PieceResult:
    """What `ingest_piece` wrote."""
    value = folder.read_json(name)
    return PieceResult(**{**value, "parts": [Part(**part) for part in value["parts"]]})


def read_part(folder: Folder, part: Part) -> Iterator[pa.Table]:
    """The rows of a part, in tables of some ten thousand."""
    with folder.read(f"{part.name}.arrow") as stream, pa.ipc.open_stream(stream) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _write_parts(folder: Folder, name: str, tables: Iterator[pa.Table], unique: Sequence[str]) -> Iterator[Part]:
    for number, first in enumerate(tables):  # each part takes more of them
        yield _write_part(folder, f"{name}-{number}", first, tables, unique)


def _write_part(folder: Folder, name: str, first: pa.Table, more: Iterator[pa.Table], unique: Sequence[str]) -> Part:
    """One part: the first table, and as many more as fill it."""
    rows = 0
    found: dict[str, list[Digests]] = {key: [] for key in unique}
    with folder.writing(f"{name}.arrow") as stream, pa.ipc.new_stream(stream, SCHEMA) as writer:
        table: pa.Table | None = first
        while table is not None:
            writer.write_table(table)
            rows += table.num_rows
            for key in unique:
                found[key].append(KEYS[key](table))
            table = next(more, None) if rows < ROWS_PER_PART else None
    buckets = {}
    for key in unique:
        records, buckets[key] = sorted_records(np.concatenate(found[key]))
        with folder.writing(f"{name}.{key}") as stream:
            stream.write(records.tobytes())
    return Part(name, rows, buckets)
