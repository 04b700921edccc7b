"""Files that hold tables, on any file system: finding them, telling their kind, their columns."""

from __future__ import annotations

import contextlib
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from data_prep.tables.json_tables import load_json_list
from data_prep.tables.lines import CsvRecords, lines
from formats.errors import UserError, nearest_of

SNIFFED_BYTES = 4096
SNIFFED_LINES = 100
KIND_BY_EXTENSION = {
    "parquet": "parquet",
    "csv": "csv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",  # or one JSON list: `text_kind` looks
    "tsv": "tsv",
}
_ARCHIVES = (".zip", ".7z", ".rar")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def kind_by_name(path: str) -> str | None:
    """What a table of this name should be, packed or not; None if the name does not say."""
    name = path.lower().rsplit("/", 1)[-1]
    for packed in COMPRESSED:
        name = name.removesuffix(packed)
    return KIND_BY_EXTENSION.get(name.rpartition(".")[2]) if "." in name else None


def find_tables(source: str) -> list[str]:
    """A file, a folder of tables, or a pattern -> paths that fsspec opens. Raises UserError when there is none."""
    filesystem, path = fsspec.core.url_to_fs(source)
    if filesystem.isfile(path):
        found = [path]
    elif filesystem.isdir(path):
        entries = sorted(filesystem.ls(path, detail=False))
        found = [entry for entry in entries if kind_by_name(entry) and not entry.rsplit("/", 1)[-1].startswith(".")]
    else:
        found = sorted(filesystem.glob(path))
    if not found:
        extensions = ", *.".join(KIND_BY_EXTENSION)
        raise UserError(f"{source}: no such file, folder or pattern with a table (*.{extensions})")
    if archive := next((entry for entry in found if entry.lower().endswith(_ARCHIVES)), None):
        raise UserError(f"{archive} is an archive of files: unpack it, and name the tables in it")
    return [filesystem.unstrip_protocol(entry) for entry in found]


@contextlib.contextmanager
def open_table(path: str) -> Iterator[BinaryIO]:
    """A file to read, unpacked where its name says that it is packed."""
    _, bare = fsspec.core.url_to_fs(path)
    packed = infer_compression(bare)
    if packed is None and bare.lower().endswith(COMPRESSED):
        raise UserError(f"packed as *{bare[bare.rfind('.') :]}, which needs a library that is not installed: unpack it")
    with fsspec.open(path, "rb", compression=packed) as stream:
        yield stream


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the file's name before whatever goes wrong inside, as a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def text_kind(stream: BinaryIO, kind: str) -> str:
    """The kind of a text table once more, by how it begins: `.json` may be lines or one list.

    Raises UserError for UTF-16 and for lines that end in carriage returns alone.
    """
    start = stream.read(SNIFFED_BYTES)
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1")):
        raise UserError(
            "is no text but packed, or parquet: give it a name that says so (*.gz, *.parquet), or unpack it"
        )
    first_line = start.partition(b"\n")[0]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or first_line.count(0) > len(first_line) // 4:
        raise UserError("is UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8")
    if kind in ("csv", "tsv") and b"\r" in first_line.rstrip(b"\r"):
        raise UserError("its lines end in carriage returns alone: convert it with tr '\\r' '\\n'")
    return "json" if kind == "jsonl" and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else kind


def columns_of(stream: BinaryIO, kind: str) -> tuple[tuple[str, ...], int]:
    """The names of a table's columns, and the length of its header in bytes. Raises UserError."""
    if kind == "parquet":
        try:
            return tuple(pq.ParquetFile(stream).schema_arrow.names), 0
        except pa.ArrowInvalid as error:
            why = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"is no whole parquet file ({why}): download it again, or name it as what it is") from error
    if kind == "csv":
        header, fields = next(iter(CsvRecords(lines(stream))), (b"", []))
        if fields is None:
            raise UserError("its first line is no header: a quote in it is not closed")
        return _columns(fields, kind), len(header)
    if kind == "tsv":
        header = next(lines(stream), b"")
        return _columns(header.rstrip(b"\r\n").split(b"\t"), kind), len(header)
    names: dict[str, None] = {}
    for value in load_json_list(stream) if kind == "json" else _sniffed_json(stream):
        names.update(dict.fromkeys(value) if isinstance(value, dict) else {})
    return tuple(names), 0


def find_column(names: Sequence[str], chosen: str | None, usual: Sequence[str], flag: str) -> str:
    """The column that the user chose, or the first with a usual name, in upper or lower case.

    Raises UserError when there is none, or two of one name.
    """
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None) if chosen is None else chosen
    if found is None:
        raise UserError(f"no column named {' or '.join(usual)}: name it with {flag}{nearest_of(usual[0], names)}")
    if names.count(found) != 1:
        problem = (
            f"several columns named {found!r}" if found in names else f"no column {found!r}{nearest_of(found, names)}"
        )
        raise UserError(problem)
    return found


def _columns(fields: Sequence[bytes], kind: str) -> tuple[str, ...]:
    """The names in a header. Raises UserError for a single one that holds another separator."""
    names = _decoded(fields)
    other = next((mark for mark in ";|,\t" if mark in names[0]), None) if len(names) == 1 else None
    if other is not None:
        advice = "name it *.tsv" if other == "\t" else "write it with commas as *.csv, or with tabs as *.tsv"
        raise UserError(f"its header is one column, {names[0]!r}: fields of {kind} are not cut at {other!r}; {advice}")
    return names


def _decoded(fields: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(field.decode("utf-8", "replace").removeprefix("\ufeff").strip() for field in fields)


def _sniffed_json(stream: BinaryIO) -> Iterator[object]:
    for line, _ in zip(lines(stream), range(SNIFFED_LINES), strict=False):
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)
