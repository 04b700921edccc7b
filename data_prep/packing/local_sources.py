"""Pictures and captions that are already here: a folder, or tables of paths or of image bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.tables.files import columns_of, find_column, find_tables, kind_by_name, naming, open_table, text_kind
from data_prep.tables.lines import Range, Refused
from data_prep.tables.readers import read_rows
from formats.errors import UserError
from formats.tar import MAX_MEMBER_BYTES
from formats.texts import TextError, clean, decode_text

PICTURE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp")
IMAGE_NAMES = ("image", "filepath", "path", "image_path", "file_name", "filename", "jpg")
CAPTION_NAMES = ("caption", "captions", "text", "title")
NAME_NAMES = ("filename", "file_name", "name", "key", "id")
NOT_TAKEN = "not a JPEG, PNG or WebP"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns to read; None means: find it by its usual names. Labels are read only on request."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture, as its bytes or as the file that holds them, with what the source says about it."""

    image: bytes | Path
    captions: tuple[str, ...]
    label: str | None
    name: str

    def read(self) -> bytes:
        """Its bytes. Raises OSError for what is no readable file, or larger than a shard's reader takes."""
        if isinstance(self.image, bytes):
            return self.image
        if not self.image.is_file():  # nor a device, which may have no end
            raise FileNotFoundError(self.image)
        if self.image.stat().st_size > MAX_MEMBER_BYTES:
            raise OSError(f"more than {MAX_MEMBER_BYTES} bytes")
        return self.image.read_bytes()

    @property
    def identity(self) -> str:
        """What tells it from other pictures: its file, or the hash of its bytes."""
        if isinstance(self.image, bytes):
            return hashlib.sha256(self.image).hexdigest()
        return os.path.normpath(self.image)


Item = Picture | str  # a picture, or the reason why a row or file gives none


@dataclasses.dataclass(frozen=True)
class Source:
    """Where pictures come from. `read` begins anew at each call; `classes` are a folder's subfolders that hold some."""

    path: Path
    read: Callable[[], Iterator[Item]]
    count: int | None  # if known without reading
    classes: tuple[str, ...] | None = None  # None: a table


def open_source(path: Path, columns: Columns, with_captions: bool = True) -> Source:
    """Open a folder of pictures, a table, or a folder of tables: `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet`.

    Without captions, a folder's `.txt` files are not looked at: they cost no picture that has a label.
    Raises UserError when it is missing, of another type, empty, or lacks a column.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        files = sorted(_files(path))
        if any(file.suffix.lower() in PICTURE_ENDINGS for file in files) or not any(
            kind_by_name(file.name) for file in path.iterdir()
        ):
            return _open_folder(path, files, columns, with_captions)
    elif kind_by_name(path.name) is None:
        raise UserError(f"{path}: cannot pack {path.suffix or 'this'}: give a folder, .csv, .tsv, .json or .parquet")
    tables = [_Table(Path(file.removeprefix("file://")), columns) for file in find_tables(str(path))]
    counts = [table.rows for table in tables]
    return Source(
        path,
        lambda: (item for table in tables for item in table.read()),
        None if None in counts else sum(count or 0 for count in counts),
    )


def _files(folder: Path) -> Iterator[Path]:
    """All below a folder, links to folders followed once, without names that begin with a dot.

    Raises OSError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            yield from (Path(parent, name) for name in names if not name.startswith("."))
        seen.add(real)


def _open_folder(folder: Path, files: Sequence[Path], columns: Columns, with_captions: bool) -> Source:
    if columns != Columns():
        raise UserError(f"{folder} is a folder of pictures: drop the names of columns, which are for tables")
    captions = {file.with_suffix(""): file for file in files if with_captions and file.suffix.lower() == ".txt"}
    others = [file for file in files if file.suffix.lower() not in (".txt", ".json")]
    if not others:
        raise UserError(f"{folder} holds no image (*{', *'.join(PICTURE_ENDINGS)})")
    orphans = len(captions.keys() - {file.with_suffix("") for file in others})

    def read() -> Iterator[Item]:
        for file in others:
            name = clean(str(file.relative_to(folder)))
            ending = file.suffix.lower()
            if ending not in PICTURE_ENDINGS:
                yield f"{NOT_TAKEN}: *{ending or ' without an ending'}"
                continue
            label = clean(file.relative_to(folder).parts[0]) if file.parent != folder else None
            try:
                text = captions[file.with_suffix("")].read_bytes() if file.with_suffix("") in captions else None
                yield Picture(file, captions_of(text), label, name)
            except OSError:
                yield "caption cannot be read"
            except ValueError as error:
                yield str(error)
        for _ in range(orphans):
            yield "caption without a picture"

    pictures = (file for file in others if file.suffix.lower() in PICTURE_ENDINGS and file.parent != folder)
    classes = {clean(file.relative_to(folder).parts[0]) for file in pictures}
    return Source(folder, read, len(others) + orphans, tuple(sorted(classes)))


class _Table:
    """A table of pictures: its columns are found at once, its rows are read on demand."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        self.rows: int | None = None
        self._kind = kind_by_name(path.name) or ""
        if self._kind != "parquet":
            with naming(str(path)), open_table(str(path)) as stream:
                self._kind = text_kind(stream, self._kind)
        with naming(str(path)), open_table(str(path)) as stream:
            self._names, self._header_bytes = columns_of(stream, self._kind)
            names = self._names
            schema = None
            if self._kind == "parquet":
                file = pq.ParquetFile(stream)
                self.rows, schema = file.metadata.num_rows, file.schema_arrow
                if columns.image is None:
                    names = tuple(field.name for field in schema if _may_be_image(field.type))
            self._columns = self._find(names, columns)
            if schema is not None:
                _check_types(schema, self._columns)

    def _find(self, image_names: Sequence[str], columns: Columns) -> dict[str, str]:
        """What to read: the image, its caption (which a source with labels may lack), label and name."""
        found = {"image": find_column(image_names, columns.image, IMAGE_NAMES, "--image-column")}
        if columns.label is not None:
            found["label"] = find_column(self._names, columns.label, (), "--label-column")
        if columns.label is None or columns.caption is not None:
            others = [name for name in self._names if name != found["image"]]
            found["caption"] = find_column(others, columns.caption, CAPTION_NAMES, "--caption-column")
        name = next((name for name in NAME_NAMES if name in self._names), None)
        return found | ({"name": name} if name else {})

    def read(self) -> Iterator[Item]:
        with naming(str(self._path)), open_table(str(self._path)) as stream:
            rows = read_rows(self._kind, stream, Range(self._header_bytes), self._names, self._columns)
            for number, row in enumerate(rows, 1):
                if isinstance(row, Refused):
                    yield row.reason
                    continue
                try:
                    yield self._picture(row, number)
                except ValueError as error:
                    yield str(error)

    def _picture(self, row: dict[str, Any], number: int) -> Picture:
        image = row["image"]
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(image, dict):  # as Hugging Face datasets stores them: {bytes, path}
            image = image.get("bytes") or path
        if isinstance(image, str):
            if image.startswith(("http://", "https://")):
                raise ValueError("a url, which data-prep ingest and download are for")
            image = self._path.parent / image if image.strip() else None
        if not isinstance(image, bytes | Path):
            raise ValueError("no image")
        named = row.get("name") or (path if isinstance(path, str) else None)
        return Picture(image, captions_of(row.get("caption")), _label(row.get("label")), str(named or f"row {number}"))


def _may_be_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return int(kind.get_field_index("bytes")) >= 0
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    return any(check(kind) for check in checks)


def _check_types(schema: pa.Schema, columns: Mapping[str, str]) -> None:
    """Raise UserError for a column in which no row can be read."""
    for role, name in columns.items():
        kind = schema.field(name).type
        if role == "image" and not _may_be_image(kind):
            raise UserError(f"column {name!r} holds {kind}, neither image bytes nor paths")
        if role in ("caption", "label") and (pa.types.is_struct(kind) or pa.types.is_map(kind)):
            raise UserError(f"column {name!r} holds {kind}, not text: name another with --{role}-column")


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a text, a number or a list of them, trimmed, those that show nothing left out.

    Raises ValueError with the reason for what is no text, or not UTF-8.
    """
    values = value if isinstance(value, list) else [value]
    texts = [_text(each) for each in values if each is not None and each == each]  # NaN is not itself
    return tuple(text for text in texts if text)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | bytes | int | float):
        raise ValueError("caption is no text")
    try:
        return decode_text(value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass"))
    except TextError as error:
        raise ValueError("caption is not UTF-8") from error


def _label(value: Any) -> str | None:
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None
