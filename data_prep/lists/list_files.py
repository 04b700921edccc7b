"""Finding url lists on any file system, telling their format, and cutting them into pieces."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from data_prep.lists.catalogue import GENERIC, INGESTIBLE, SOURCES, withdrawn_source
from data_prep.lists.lines import lines
from data_prep.lists.url_lists import READERS, Chunk, ColumnChoice, Range, find_columns
from formats.errors import UserError, nearest_of

PIECE_BYTES = 128 << 20  # of text: about 600,000 rows
PIECE_ROWS = 500_000  # of parquet, in whole row groups
SNIFFED_LINES = 100
KIND_BY_EXTENSION = {
    "parquet": "parquet",
    "csv": "csv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "tsv": "tsv",
}
COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")


@dataclasses.dataclass(frozen=True)
class ListFormat:
    """What the user says about the lists: `name` is "auto", one of `GENERIC`, or a source of the catalogue."""

    name: str = "auto"
    columns: ColumnChoice = dataclasses.field(default_factory=ColumnChoice)
    cleaned_copy: bool = False  # of withdrawn metadata


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one list that is read by itself: the same piece always gives the same rows."""

    path: str
    version: str  # changes when the file does
    kind: str
    part: Range
    names: tuple[str, ...]  # of the list's columns
    columns: Mapping[str, str]  # canonical name -> the list's

    def read(self) -> Iterator[Chunk]:
        """Yield its rows; errors carry the file's name."""
        with naming(self.path), _open(self.path) as stream:
            yield from READERS[self.kind](stream, self.part, self.names, self.columns)

    def identity(self) -> str:
        """A digest of everything that decides its rows."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def find_pieces(sources: Sequence[str], list_format: ListFormat) -> list[Piece]:
    """The pieces of all lists, in the order of `sources` and of the names within a folder or pattern.

    Raises UserError for a source that is missing or of an unknown or refused format, or has no url or caption column.
    """
    if list_format.name in SOURCES:
        _refuse_withdrawn(list_format.name, "--format " + list_format.name, list_format)
        if not SOURCES[list_format.name].kind:
            raise UserError(f"{list_format.name} has no url list: {SOURCES[list_format.name].note}")
    pieces: list[Piece] = []
    for source in sources:
        for path in _expand(source):
            with naming(path):
                pieces += _pieces_of(path, list_format)
    return pieces


def _pieces_of(path: str, list_format: ListFormat) -> Iterator[Piece]:
    filesystem, bare = fsspec.core.url_to_fs(path)
    kind = _kind(path, list_format.name)
    size_bytes = None if infer_compression(bare) else int(filesystem.size(bare))
    with _open(path) as stream:
        names, header_bytes = _names(stream, kind, list_format)
        if kind == "parquet":
            parts = list(_row_group_ranges(pq.ParquetFile(stream)))
        elif kind in ("tsv", "jsonl") and size_bytes:
            starts = range(header_bytes, max(size_bytes, header_bytes + 1), PIECE_BYTES)
            parts = [Range(start, min(start + PIECE_BYTES, size_bytes)) for start in starts]
        else:
            parts = [Range(header_bytes)]
    found = withdrawn_source(path, names) if list_format.name in ("auto", *GENERIC) else None
    if found:
        _refuse_withdrawn(found.name, "this", list_format)
    columns = {} if kind.endswith("-json") else find_columns(names, list_format.columns)
    version = str(filesystem.ukey(bare))
    for part in parts:
        yield Piece(path, version, kind, part, names, columns)


def _kind(path: str, name: str) -> str:
    if name in SOURCES:
        return SOURCES[name].kind
    if name != "auto":
        return name
    file_name = path.lower().rsplit("/", 1)[-1]
    for packed in COMPRESSED[1:]:
        file_name = file_name.removesuffix(packed)
    extension = file_name.rsplit(".", 1)[-1]
    if extension not in KIND_BY_EXTENSION:
        formats = (*GENERIC, *INGESTIBLE)
        raise UserError(f"cannot tell the format by the name: pass --format{nearest_of(extension, formats)}")
    return KIND_BY_EXTENSION[extension]


def _names(stream: BinaryIO, kind: str, list_format: ListFormat) -> tuple[tuple[str, ...], int]:
    """The names of the list's columns, and the length of its header in bytes."""
    if kind == "parquet":
        return tuple(pq.ParquetFile(stream).schema_arrow.names), 0
    if kind == "csv":
        return _csv_header(stream)
    if kind == "jsonl":
        return _json_names(stream), 0
    if kind == "tsv":
        source = SOURCES.get(list_format.name)
        if source and source.headerless:
            _refuse_choice(list_format.columns)
            return source.columns, 0
        return _tsv_names(stream, list_format.columns)
    return SOURCES[list_format.name].columns, 0


def _csv_header(stream: BinaryIO) -> tuple[tuple[str, ...], int]:
    consumed = 0

    def texts() -> Iterator[str]:
        nonlocal consumed
        for line in lines(stream):
            text = line.decode("utf-8-sig" if consumed == 0 else "utf-8", "replace").replace("\0", "")
            consumed += len(line)
            yield text

    try:
        return tuple(next(csv.reader(texts()), [])), consumed
    except csv.Error as error:
        raise UserError(f"no header line: {error}") from error


def _json_names(stream: BinaryIO) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for line, _ in zip(lines(stream), range(SNIFFED_LINES), strict=False):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            names.update(dict.fromkeys(value) if isinstance(value, dict) else {})
    return tuple(names)


def _tsv_names(stream: BinaryIO, choice: ColumnChoice) -> tuple[tuple[str, ...], int]:
    """By the header if the first line is one, else by where an address stands in the first lines."""
    first_lines = [line for line, _ in zip(lines(stream), range(SNIFFED_LINES), strict=False)]
    header = first_lines[0] if first_lines else b""
    names = tuple(header.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t"))
    try:
        find_columns(names, choice)
    except UserError:
        _refuse_choice(choice)
    else:
        return names, len(header)
    url_first = any(line.lower().startswith((b"http://", b"https://")) for line in first_lines)
    return ("url", "caption") if url_first else ("caption", "url"), 0


def _refuse_choice(choice: ColumnChoice) -> None:
    if choice != ColumnChoice():
        raise UserError("this TSV list has no header: drop --url-column/--caption-column, or give it one")


def _row_group_ranges(file: pq.ParquetFile) -> Iterator[Range]:
    start = rows = 0
    for group in range(file.num_row_groups):
        rows += file.metadata.row_group(group).num_rows
        if rows >= PIECE_ROWS or group == file.num_row_groups - 1:
            yield Range(start, group + 1)
            start, rows = group + 1, 0


def _refuse_withdrawn(name: str, subject: str, list_format: ListFormat) -> None:
    source = SOURCES[name]
    if source.withdrawn and not list_format.cleaned_copy:
        raise UserError(
            f"{subject} is {source.title} metadata, {source.withdrawn}: use Re-LAION (--format re-laion-5b), or pass "
            "--i-have-a-cleaned-copy"
        )


def _expand(source: str) -> list[str]:
    """A file, a folder of lists, or a pattern -> paths that fsspec opens."""
    filesystem, path = fsspec.core.url_to_fs(source)
    endings = tuple(f".{extension}{packed}" for extension in KIND_BY_EXTENSION for packed in COMPRESSED)
    if filesystem.isfile(path):
        found = [path]
    elif filesystem.isdir(path):
        found = sorted(entry for entry in filesystem.ls(path, detail=False) if entry.endswith(endings))
    else:
        found = sorted(filesystem.glob(path))
    if not found:
        extensions = ", *.".join(KIND_BY_EXTENSION)
        raise UserError(f"{source}: no such file, folder or pattern with a url list (*.{extensions})")
    return [filesystem.unstrip_protocol(entry) for entry in found]


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    _, bare = fsspec.core.url_to_fs(path)
    with fsspec.open(path, "rb", compression=infer_compression(bare)) as stream:
        yield stream


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the file's name before whatever goes wrong inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
