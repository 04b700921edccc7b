"""The first half of ingest: a piece of a url list -> canonical rows in Arrow files, with the digests of their keys.

A finished piece is a JSON file in the work folder, named by a digest of all that decides its rows. So a restart or
another array job finds what is done, and a change of options or of a list finds nothing that does not fit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.lists.canonical import SCHEMA, Rejects, canonicalise, pair_digests
from data_prep.lists.duplicates import Digests, digests, sorted_records
from data_prep.lists.folders import Folder
from data_prep.lists.list_files import ListFormat, Piece, naming
from data_prep.lists.row_filters import Filters

FORMAT_VERSION = 1  # of the work folder; raise it when the same options would give other rows
ROWS_PER_PART = 1_000_000

KEYS: Mapping[str, Callable[[pa.Table], Digests]] = {
    "url": lambda table: digests(table["url"]),
    "caption": lambda table: digests(table["caption"]),
    "pair": pair_digests,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the rows that ingest writes. `unique`: keys of `KEYS` of which every value may occur once."""

    list_format: ListFormat = dataclasses.field(default_factory=ListFormat)
    filters: Filters = dataclasses.field(default_factory=Filters)
    unique: tuple[str, ...] = ("url",)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Share `index` of `count` of the work, for array jobs; index from 0."""

    index: int = 0
    count: int = 1


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
    with naming(piece.path):
        if piece.columns:  # the JSON lists of the catalogue have none of the columns that limits are about
            options.filters.check_columns(list(piece.columns))
    rejects = Rejects()
    rows_read = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal rows_read
        for chunk in piece.read():
            rows_read += chunk.malformed + chunk.table.num_rows
            rejects.add_malformed(chunk)
            with naming(piece.path):
                table = canonicalise(chunk.table, options.filters, rejects)
            yield table

    parts = list(_write_parts(folder, name, tables(), options.unique))
    examples = [{"list": piece.path, **example} for example in rejects.examples]
    result = PieceResult(piece.path, rows_read, dict(+rejects.counts), examples, parts)
    folder.write_json(f"{name}.json", dataclasses.asdict(result))
    return f"{name}.json"


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
