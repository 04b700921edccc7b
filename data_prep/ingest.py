"""Url lists -> one canonical parquet: every row has a uid, an http(s) url and a caption."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from data_prep.console import nearest, print_table, progress_bar
from data_prep.errors import UserError
from data_prep.url_lists import (
    Chunk,
    ColumnChoice,
    Reader,
    read_caption_url_tsv,
    read_csv,
    read_json_lines,
    read_parquet,
    read_url_caption_tsv,
)

UID_HEX_DIGITS = 32
ROWS_PER_GROUP = 100_000
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
    }
)
FORMATS: dict[str, Reader] = {
    "cc3m": read_caption_url_tsv,
    "cc12m": read_url_caption_tsv,
    "laion": read_parquet,
    "datacomp": read_parquet,
    "parquet": read_parquet,
    "csv": read_csv,
    "jsonl": read_json_lines,
}
READER_BY_EXTENSION = {"parquet": "parquet", "csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl"}
EXTENSIONS = (*READER_BY_EXTENSION, "tsv")
COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")


@dataclasses.dataclass
class Tally:
    """Rows read, rows written, and rows dropped by reason."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)


def ingest(sources: Sequence[str], output: str, list_format: str, choice: ColumnChoice) -> Tally:
    """Read url lists and write one parquet with the columns of `SCHEMA`; any path that fsspec knows.

    A source may be a file, a folder or a pattern. `list_format` is a key of `FORMATS`, or `auto`. Columns that
    a list does not have are null, except the uid, which is then made from url and caption. Prints a table.

    Raises UserError for a source that is missing, has no url or caption column, or when no row passes; the
    output appears under its name only when it is whole.
    """
    start_s = time.perf_counter()
    paths = [path for source in sources for path in _expand(source)]
    tally = Tally()
    with _parquet_writer(output) as writer:
        for row_group in _regroup(_canonical_tables(paths, list_format, choice, tally)):
            writer.write_table(row_group)
        if not tally.written:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in (+tally.dropped).items())
            raise UserError(f"no row of {', '.join(sources)} can be used: {reasons or 'empty'}; wrong --format?")
    _print_tally(tally, output, time.perf_counter() - start_s)
    return tally


def _canonical_tables(paths: Sequence[str], list_format: str, choice: ColumnChoice, tally: Tally) -> Iterator[pa.Table]:
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
    with progress_bar("ingest", len(paths), "file", bar_format=bar_format) as progress:
        for index, path in enumerate(paths):
            with _naming(path):
                for chunk in _read_list(path, list_format, choice):
                    table = canonicalise(chunk.table, tally.dropped)
                    tally.dropped["malformed line"] += chunk.malformed
                    tally.read += chunk.malformed + chunk.table.num_rows
                    tally.written += table.num_rows
                    progress.set_postfix_str(f"{tally.written:,} rows", refresh=False)
                    progress.update(index + chunk.fraction_done - progress.n)
                    yield table
            progress.update(index + 1 - progress.n)


def _regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables into row groups of at least `ROWS_PER_GROUP` rows."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(part.num_rows for part in pending) >= ROWS_PER_GROUP:
            yield pa.concat_tables(pending)
            pending = []
    if pending:
        yield pa.concat_tables(pending)


def canonicalise(table: pa.Table, dropped: Counter[str]) -> pa.Table:
    """Bring a chunk of a url list into `SCHEMA`; rows that cannot be used are counted in `dropped`."""
    table, not_utf8 = _decode(table)
    dropped["not UTF-8"] += not_utf8
    table = _replace(table, "url", pc.utf8_trim_whitespace(table["url"].fill_null("")))
    table = _replace(table, "caption", pc.utf8_trim_whitespace(table["caption"].fill_null("")))
    conditions = {
        "no url": pc.not_equal(table["url"], ""),
        "url not http(s)": pc.match_substring_regex(table["url"], r"^(?i:https?)://[^\s/]\S*$"),
        "no caption": pc.not_equal(table["caption"], ""),
    }
    usable: pa.ChunkedArray | None = None
    for reason, passes in conditions.items():
        before = table.num_rows if usable is None else _count(usable)
        usable = passes if usable is None else pc.and_(usable, passes)
        dropped[reason] += before - _count(usable)
    table = table.filter(usable)
    return pa.table([_column(table, field) for field in SCHEMA], schema=SCHEMA)


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    if field.name == "uid":
        return _uids(table)
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    column = table[field.name]
    if pa.types.is_string(column.type) and not pa.types.is_string(field.type):
        # text from CSV and JSON: what is no number becomes null
        numeric = pc.match_substring_regex(column, r"^[+-]?\d{1,9}(\.\d+)?([eE][+-]?\d{1,2})?$")
        column = pc.if_else(numeric, column, None).cast(pa.float64())
    return column.cast(field.type, safe=False)


def _uids(table: pa.Table) -> pa.ChunkedArray:
    made = pa.array(
        [
            hashlib.sha256(text).hexdigest()[:UID_HEX_DIGITS]
            for text in pc.binary_join_element_wise(table["url"], table["caption"], "\n").cast(pa.binary()).to_pylist()
        ],
        pa.string(),
    )
    if "uid" not in table.column_names:
        return pa.chunked_array([made])
    given = table["uid"].cast(pa.string())
    return pc.if_else(pc.equal(given.fill_null(""), ""), made, given)


def _decode(table: pa.Table) -> tuple[pa.Table, int]:
    """Cast binary columns to text; rows that are not UTF-8 are removed and counted."""
    texts = pa.schema([field.with_type(pa.string()) if _is_text(field.type) else field for field in table.schema])
    try:
        return table.cast(texts), 0
    except pa.ArrowInvalid:
        keep = [True] * table.num_rows
        for name in table.column_names:
            if _is_text(table[name].type):
                values = table[name].cast(pa.binary()).to_pylist()
                keep = [kept and _is_utf8(value) for kept, value in zip(keep, values, strict=True)]
        return table.filter(pa.array(keep)).cast(texts), keep.count(False)


def _is_text(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_dictionary,
        )
    )


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _replace(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _count(mask: pa.ChunkedArray) -> int:
    return pc.sum(mask).as_py() or 0


def _expand(source: str) -> list[str]:
    """A file, a folder of lists, or a pattern -> paths that fsspec opens."""
    filesystem, path = fsspec.core.url_to_fs(source)
    endings = tuple(f".{extension}{packed}" for extension in EXTENSIONS for packed in COMPRESSED)
    if filesystem.isfile(path):
        found = [path]
    elif filesystem.isdir(path):
        found = sorted(entry for entry in filesystem.ls(path, detail=False) if entry.endswith(endings))
    else:
        found = sorted(filesystem.glob(path))
    if not found:
        raise UserError(f"{source}: no such file, folder or pattern with a url list (*.{', *.'.join(EXTENSIONS)})")
    return [filesystem.unstrip_protocol(entry) for entry in found]


def _read_list(path: str, list_format: str, choice: ColumnChoice) -> Iterator[Chunk]:
    reader = FORMATS[_guess_format(path) if list_format == "auto" else list_format]
    with _open(path) as (stream, size_bytes):
        yield from reader(stream, size_bytes, choice)


def _guess_format(path: str) -> str:
    name = path.lower().rsplit("/", 1)[-1]
    for packed in COMPRESSED[1:]:
        name = name.removesuffix(packed)
    extension = name.rsplit(".", 1)[-1]
    if extension in READER_BY_EXTENSION:
        return READER_BY_EXTENSION[extension]
    if extension != "tsv":
        raise UserError(f"cannot tell the format by the name: pass --format{nearest(extension, FORMATS)}")
    with _open(path) as (stream, _):
        first = stream.readline(1 << 20).split(b"\t")
    if first[0].lower().startswith((b"http://", b"https://")):
        return "cc12m"
    return "cc3m"


@contextlib.contextmanager
def _open(path: str) -> Iterator[tuple[BinaryIO, int]]:
    filesystem, bare = fsspec.core.url_to_fs(path)
    compression = infer_compression(bare)
    with fsspec.open(path, "rb", compression=compression) as stream:
        # the unpacked size is unknown: a few times the packed one is close enough for a progress bar
        yield stream, filesystem.size(bare) * (4 if compression else 1)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the file's name before whatever goes wrong inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _parquet_writer(output: str) -> Iterator[pq.ParquetWriter]:
    filesystem, path = fsspec.core.url_to_fs(output)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    temporary = path + ".part"
    try:
        with filesystem.open(temporary, "wb") as stream, pq.ParquetWriter(stream, SCHEMA, compression="zstd") as writer:
            yield writer
        filesystem.mv(temporary, path)
    finally:
        if filesystem.exists(temporary):
            filesystem.rm(temporary)


def _print_tally(tally: Tally, output: str, elapsed_s: float) -> None:
    rate = tally.read / elapsed_s
    print(f"{output}: {tally.written:,} of {tally.read:,} rows, {elapsed_s:.1f} s, {rate:,.0f} rows/s")
    if +tally.dropped:
        print_table(("dropped", "rows"), [(why, f"{n:,}") for why, n in (+tally.dropped).most_common()])
