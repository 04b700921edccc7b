"""Finding url lists on any file system, telling their format, and cutting them into pieces."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from data_prep.lists.catalogue import GENERIC, INGESTIBLE, SOURCES, withdrawn_source
from data_prep.tables.files import (
    SNIFFED_LINES,
    columns_of,
    find_column,
    find_tables,
    kind_by_name,
    naming,
    open_table,
    text_kind,
)
from data_prep.tables.lines import Range, lines
from data_prep.tables.readers import Chunk, is_text, read_chunks
from formats.errors import UserError, nearest_of

PIECE_BYTES = 128 << 20  # of text: about 600,000 rows
PIECE_ROWS = 500_000  # of parquet, in whole row groups

URL_NAMES = ("url", "image_url", "imageurl", "link")
CAPTION_NAMES = ("caption", "text", "alt_text", "title", "description")
# canonical column -> the names that published lists give it, the preferred first (compared in lower case)
CARRIED: Mapping[str, Sequence[str]] = {
    "uid": ("uid",),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "sha256": ("sha256",),
    "similarity": (
        "similarity",
        "clip_l14_similarity_score",
        "clip_similarity_vitl14",
        "clip_b32_similarity_score",
        "clip_similarity_vitb32",
    ),
    "punsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "aesthetic": ("aesthetic", "aesthetic_score_laion_v2", "aesthetic_score"),
    "watermark": ("watermark", "pwatermark", "watermark_score"),
    "language": ("language", "lang"),
    "face_bboxes": ("face_bboxes",),
}
# what the readers of published JSON files find, by the canonical names
JSON_COLUMNS = {
    kind: {name: name for name in names}
    for kind, names in {
        "sbu-json": ("url", "caption"),
        "coco-json": ("url", "caption", "width", "height"),
    }.items()
}


@dataclasses.dataclass(frozen=True)
class ColumnChoice:
    """The user's names for the url and caption columns; None means: find them by their usual names."""

    url: str | None = None
    caption: str | None = None


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
        with naming(self.path), open_table(self.path) as stream:
            yield from read_chunks(self.kind, stream, self.part, self.names, self.columns)

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
        for path in find_tables(source):
            with naming(path):
                pieces += _pieces_of(path, list_format)
    return pieces


def _pieces_of(path: str, list_format: ListFormat) -> Iterator[Piece]:
    filesystem, bare = fsspec.core.url_to_fs(path)
    kind = _kind(path, list_format.name)
    if kind != "parquet":
        with open_table(path) as stream:
            kind = text_kind(stream, kind)
    with open_table(path) as stream:
        names, header_bytes = _names(stream, kind, list_format)
        found = withdrawn_source(path, names) if list_format.name in ("auto", *GENERIC) else None
        if found:
            _refuse_withdrawn(found.name, "this", list_format)
        columns = JSON_COLUMNS.get(kind) or find_columns(names, list_format.columns)
        if kind == "parquet":
            parts = list(_row_group_ranges(_checked(pq.ParquetFile(stream), columns)))
        elif kind in ("tsv", "jsonl") and not infer_compression(bare):
            size_bytes = int(filesystem.size(bare))
            starts = range(header_bytes, max(size_bytes, header_bytes + 1), PIECE_BYTES)
            parts = (
                [Range(start, min(start + PIECE_BYTES, size_bytes)) for start in starts] if size_bytes else [Range()]
            )
        else:
            parts = [Range(header_bytes)]
    version = str(filesystem.ukey(bare))
    for part in parts:
        yield Piece(path, version, kind, part, names, columns)


def _checked(file: pq.ParquetFile, columns: Mapping[str, str]) -> pq.ParquetFile:
    """Raises UserError when urls are not text, or captions neither text nor whole numbers."""
    for name in ("url", "caption"):
        kind = file.schema_arrow.field(columns[name]).type
        is_number = pa.types.is_integer(kind) or pa.types.is_decimal(kind)
        if not (is_text(kind) or (is_number and name == "caption")):
            advice = f"name another with --{name}-column, or write it as text"
            raise UserError(f"the column with the {name} holds {kind}, not text: {advice}")
    return file


def _kind(path: str, name: str) -> str:
    if name in SOURCES:
        return SOURCES[name].kind
    kind = kind_by_name(path) if name == "auto" else name
    if kind is None:
        extension = path.rpartition(".")[2].lower()
        raise UserError(
            f"cannot tell the format by the name: pass --format{nearest_of(extension, (*GENERIC, *INGESTIBLE))}"
        )
    return kind


def _names(stream: BinaryIO, kind: str, list_format: ListFormat) -> tuple[tuple[str, ...], int]:
    """The names of the list's columns, and the length of its header in bytes."""
    source = SOURCES.get(list_format.name)
    if source and source.headerless:
        _refuse_choice(list_format.columns)
        return source.columns, 0
    if source and kind.endswith("-json"):
        return source.columns, 0
    return _tsv_names(stream, list_format.columns) if kind == "tsv" else columns_of(stream, kind)


def _tsv_names(stream: BinaryIO, choice: ColumnChoice) -> tuple[tuple[str, ...], int]:
    """By the header if the first line is one, else by where an address stands in the first lines."""
    first_lines = [line for line, _ in zip(lines(stream), range(SNIFFED_LINES), strict=False)]
    header = first_lines[0] if first_lines else b""
    names, header_bytes = columns_of(io.BytesIO(header), "tsv")
    try:
        find_columns(names, choice)
    except UserError:
        _refuse_choice(choice)
    else:
        return names, header_bytes
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


def find_columns(names: Sequence[str], choice: ColumnChoice) -> dict[str, str]:
    """Canonical name -> the list's own name, for the url, the caption and the carried columns present.

    Raises UserError when the url or caption column is not among `names`.
    """
    columns = {
        "url": find_column(names, choice.url, URL_NAMES, "--url-column"),
        "caption": find_column(names, choice.caption, CAPTION_NAMES, "--caption-column"),
    }
    lower = {name.lower(): name for name in reversed(names)}
    for canonical, aliases in CARRIED.items():
        found = next((lower[alias] for alias in aliases if alias in lower), None)
        if found is not None and found not in columns.values():
            columns[canonical] = find_column(names, found, (), "")
    return columns
