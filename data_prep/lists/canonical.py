"""Rows of any url list -> the canonical columns: cleaned, filtered, and every refused row counted by its reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.lists.cleaning import canonical_urls, clean_captions
from data_prep.lists.duplicates import Digests, digests
from data_prep.lists.row_filters import Filters, conditions
from data_prep.lists.url_lists import EXAMPLE_CHARS, Chunk
from formats.errors import UserError

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
        "face_bboxes": pa.list_(pa.list_(pa.float32())),
    }
)
EXAMPLES_PER_REASON = 5  # of every piece of a list


@dataclasses.dataclass
class Rejects:
    """How many rows were refused for which reason, and a few of each to read."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, reason: str, table: pa.Table) -> None:
        """Count the rows of a table with `url` and `caption`."""
        room = max(EXAMPLES_PER_REASON - self.counts[reason], 0)
        self.counts[reason] += table.num_rows
        for row in table.slice(0, room).select(["url", "caption"]).to_pylist():
            self.examples.append({"reason": reason} | {name: _readable(value) for name, value in row.items()})

    def add_malformed(self, chunk: Chunk) -> None:
        """Count the lines of a chunk that could not be parsed."""
        room = max(EXAMPLES_PER_REASON - self.counts["malformed line"], 0)
        self.counts["malformed line"] += chunk.malformed
        self.examples += [{"reason": "malformed line", "line": text} for text in chunk.examples[:room]]


def canonicalise(table: pa.Table, filters: Filters, rejects: Rejects) -> pa.Table:
    """Bring a chunk of a url list into `SCHEMA`; rows that cannot or shall not be used go into `rejects`.

    Raises UserError when urls or captions are not text.
    """
    table = _only_utf8(table, rejects)
    urls = pc.utf8_trim_whitespace(pc.fill_null(table["url"], ""))
    cleaned = _replaced(table, "url", canonical_urls(urls))
    cleaned = _replaced(cleaned, "caption", clean_captions(table["caption"]))
    canonical = pa.table([_column(cleaned, field) for field in SCHEMA], schema=SCHEMA)
    usable = pa.chunked_array([np.ones(table.num_rows, np.bool_)])
    for reason, passes in _conditions(urls, canonical, filters):
        refused = pc.and_not(usable, pc.fill_null(passes, False))
        if pc.any(refused).as_py():
            rejects.add(reason, table.filter(refused))
            usable = pc.and_not(usable, refused)
    if not pc.all(usable, min_count=0).as_py():
        canonical = canonical.filter(usable)
    return _replaced(canonical, "uid", _uids(canonical))


def _conditions(urls: pa.ChunkedArray, canonical: pa.Table, filters: Filters) -> Iterator[tuple[str, pa.ChunkedArray]]:
    if canonical["url"].null_count:
        yield "no url", pc.not_equal(urls, "")
        yield "url not http(s)", pc.match_substring_regex(urls, r"^(?i:https?):")
        yield "malformed url", pc.is_valid(canonical["url"])
    yield "no caption", pc.not_equal(canonical["caption"], "")
    yield from conditions(canonical, filters)


def pair_digests(table: pa.Table) -> Digests:
    """[n, 2] digests of url, a line feed and caption: what uids are made of."""
    return digests(pc.binary_join_element_wise(table["url"], table["caption"], "\n"))


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


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    absent = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    if field.name not in table.column_names:
        return absent
    column = table[field.name]
    if pa.types.is_list(field.type):
        return column.cast(field.type, safe=False) if pa.types.is_list(column.type) else absent
    if pa.types.is_string(field.type):
        return column.cast(field.type)
    if pa.types.is_string(column.type):
        # text from CSV and JSON: what is no number becomes null
        numeric = pc.match_substring_regex(column, r"^[+-]?\d{1,9}(\.\d+)?([eE][+-]?\d{1,2})?$")
        column = pc.if_else(numeric, column, None).cast(pa.float64())
    if pa.types.is_integer(field.type):
        # NaN and what is beyond the type become null
        column = column.cast(pa.float64(), safe=False)
        column = pc.if_else(pc.less(pc.abs(column), 2**31), column, None)
    return column.cast(field.type, safe=False)


def _only_utf8(table: pa.Table, rejects: Rejects) -> pa.Table:
    """Cast binary columns to text; rows that are not UTF-8 are refused."""
    text_columns = [field.name for field in table.schema if _is_text(field.type)]
    for name in ("url", "caption"):
        if name not in text_columns:
            raise UserError(f"the column with the {name} holds {table[name].type}, not text")
    for name in text_columns:  # from text too: what a parquet file calls text need not be UTF-8
        table = _replaced(table, name, _as_bytes(table[name]))
    texts = pa.schema([field.with_type(pa.string()) if field.name in text_columns else field for field in table.schema])
    try:
        return table.cast(texts)
    except pa.ArrowInvalid:
        keep = [True] * table.num_rows
        for name in text_columns:
            keep = [kept and _is_utf8(value) for kept, value in zip(keep, table[name].to_pylist(), strict=True)]
        rejects.add("not UTF-8", table.filter(pc.invert(pa.array(keep))))
        return table.filter(pa.array(keep)).cast(texts)


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.binary())


def _is_text(kind: pa.DataType) -> bool:
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_dictionary,
        pa.types.is_null,
    )
    return any(check(kind) for check in checks)


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _readable(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
    return text[:EXAMPLE_CHARS]
