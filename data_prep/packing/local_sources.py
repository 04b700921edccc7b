"""Images and captions that are already here: a folder, a CSV or TSV of paths, a parquet with image bytes."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import UserError, nearest_of
from formats.pictures import picture_format

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_NAMES = ("image", "filepath", "path", "image_path", "file_name", "filename", "jpg")
CAPTION_NAMES = ("caption", "captions", "text", "title")
NAME_NAMES = ("filename", "file_name", "name", "key", "id")
ROWS_PER_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns to read; None means: find it by its usual names. Labels are read only on request."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image with what the source says about it; `image` is None when its file cannot be read."""

    image: bytes | None
    captions: tuple[str, ...]
    label: str | None
    name: str

    @property
    def extension(self) -> str | None:
        """`jpg`, `png` or `webp` by content; None for anything else."""
        return None if self.image is None else picture_format(self.image)


@dataclasses.dataclass(frozen=True)
class Source:
    """A number of pictures, and an iterator that reads them one by one."""

    count: int
    pictures: Iterator[Picture]


def open_source(path: Path, columns: Columns) -> Source:
    """Open a folder, `.csv`, `.tsv` or `.parquet`.

    Raises UserError when it is missing, of another type, empty, or lacks a column.
    """
    if path.is_dir():
        if columns != Columns():
            raise UserError(f"{path} is a folder: column names are for CSV and parquet")
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".parquet":
        return _open_parquet(path, columns)
    if path.suffix in (".csv", ".tsv"):
        return _open_csv(path, columns)
    raise UserError(f"{path}: cannot pack {path.suffix or 'this'}: give a folder, .csv, .tsv or .parquet")


def _open_folder(folder: Path) -> Source:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no image (*{', *'.join(IMAGE_SUFFIXES)})")

    def pictures() -> Iterator[Picture]:
        for path in paths:
            caption = _read(path.with_suffix(".txt"))
            text = None if caption is None else caption.decode("utf-8", "replace")
            yield Picture(_read(path), _captions(text), None, str(path.relative_to(folder)))

    return Source(len(paths), pictures())


def _open_csv(path: Path, columns: Columns) -> Source:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, delimiter=delimiter)
            header = next(rows, [])
            count = sum(1 for row in rows if row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable UTF-8 table: {error}") from error
    image = _find(path, header, columns.image, IMAGE_NAMES, "--image-column")
    caption, label = _text_columns(path, header, columns, taken=image)

    def pictures() -> Iterator[Picture]:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for row in csv.DictReader(stream, delimiter=delimiter):
                name = row[image] or ""
                captions = _captions(row[caption]) if caption else ()
                yield Picture(_read(path.parent / name), captions, row[label] if label else None, name)

    return Source(count, pictures())


def _open_parquet(path: Path, columns: Columns) -> Source:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    schema = file.schema_arrow
    names = [name for name in schema.names if _holds_bytes(schema.field(name).type) or name == columns.image]
    image = _find(path, names, columns.image, IMAGE_NAMES, "--image-column")
    if not _holds_bytes(schema.field(image).type):
        raise UserError(f"{path}: column {image!r} holds {schema.field(image).type}, not image bytes")
    caption, label = _text_columns(path, schema.names, columns, taken=image)
    name_column = next((name for name in NAME_NAMES if name in schema.names), None)
    wanted = [name for name in (image, caption, label, name_column) if name]

    def pictures() -> Iterator[Picture]:
        index = 0
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=list(dict.fromkeys(wanted))):
            for row in batch.to_pylist():
                value = row[image]
                yield Picture(
                    image=value["bytes"] if isinstance(value, dict) else value,
                    captions=_captions(row[caption]) if caption else (),
                    label=None if label is None or row[label] is None else str(row[label]),
                    name=str(row[name_column]) if name_column else f"row {index}",
                )
                index += 1

    return Source(int(file.metadata.num_rows), pictures())


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # as Hugging Face datasets stores images: {bytes, path}
        return int(kind.get_field_index("bytes")) >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _text_columns(path: Path, names: Sequence[str], columns: Columns, taken: str) -> tuple[str | None, str | None]:
    """The caption and the label column; a source with labels may do without captions."""
    label = _find(path, names, columns.label, (), "--label-column") if columns.label else None
    if label and not columns.caption:
        return None, label
    others = [name for name in names if name != taken]
    return _find(path, others, columns.caption, CAPTION_NAMES, "--caption-column"), label


def _find(path: Path, names: Sequence[str], chosen: str | None, usual: Sequence[str], flag: str) -> str:
    if chosen is not None:
        if chosen not in names:
            raise UserError(f"{path} has no column {chosen!r}{nearest_of(chosen, names)}")
        return chosen
    found = next((name for name in usual if name in names), None)
    if found is None:
        raise UserError(f"{path} has no column {' or '.join(usual)}: name it with {flag}{nearest_of(usual[0], names)}")
    return found


def _captions(value: Any) -> tuple[str, ...]:
    """The captions in a text or in a list of texts, trimmed, the empty ones left out."""
    texts = value if isinstance(value, list) else [value]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
