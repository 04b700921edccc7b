"""Reading url lists as they are published: TSV, CSV, JSON lines, parquet and two JSON files, in pieces.

Large lists are cut into pieces that can be read by themselves: byte ranges of TSV and JSON lines, row groups of
parquet. Every reader yields `Chunk`s whose table has the columns `url` and `caption`, and those of `CARRIED` that the
list has, all still in the list's own types. Memory is bounded by one block, whatever the size of the file.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_prep.lists.lines import OVERLONG, blocks_of_lines, lines
from formats.errors import UserError, nearest_of

ROWS_PER_CHUNK = 50_000
EXAMPLES_PER_CHUNK = 5
EXAMPLE_CHARS = 300
CSV_FIELD_CHARS = 1 << 20  # a longer field costs its line

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


@dataclasses.dataclass(frozen=True)
class ColumnChoice:
    """The user's names for the url and caption columns; None means: find them by their usual names."""

    url: str | None = None
    caption: str | None = None


@dataclasses.dataclass(frozen=True)
class Range:
    """A piece of one list: bytes of a text file (lines that begin in it), or row groups of a parquet file."""

    start: int = 0
    stop: int | None = None  # None: to the end


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows of a url list; how many lines could not be parsed, and a few of them as they stand in the list."""

    table: pa.Table
    malformed: int = 0
    examples: tuple[str, ...] = ()


def read_tsv(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Lines of fields without quoting; `names` are those of all fields, `columns` as of `find_columns`."""
    for block, overlong in blocks_of_lines(stream, part.start, part.stop):
        # Arrow takes a carriage return for the end of a line; between line feeds it is a character like others
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").removesuffix(b"\r").replace(b"\r", b" ")
        block, malformed = _split_malformed(block, len(names))
        malformed += [OVERLONG.decode()] * overlong
        if not block:
            yield _chunk(_table([], list(columns)), malformed)
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
        yield _chunk(table.rename_columns(list(columns)), malformed)


def _split_malformed(block: bytes, fields: int) -> tuple[bytes, list[str]]:
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
    malformed = [
        block[start : min(end, start + EXAMPLE_CHARS)].decode("utf-8", "replace")
        for start, end in zip(starts[bad].tolist(), ends[bad].tolist(), strict=True)
    ]
    good_bytes = np.repeat(~bad, ends + 1 - starts)[: len(block)]
    return data[good_bytes].tobytes(), malformed


def read_csv(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Comma-separated; quoted fields may hold commas and line breaks."""
    csv.field_size_limit(CSV_FIELD_CHARS)
    texts = (line.decode("utf-8", "surrogateescape").replace("\0", "") for line in lines(stream, part.start))
    rows = csv.reader(texts)
    indices = {name: names.index(source) for name, source in columns.items()}

    def records() -> Iterator[dict[str, Any] | str]:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {rows.line_num}: {error}"
                continue
            if row:
                well_formed = len(row) == len(names)
                yield {name: row[index] for name, index in indices.items()} if well_formed else ",".join(row)

    yield from _chunks(records(), list(indices))


def read_json_lines(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """One JSON object per line; `columns` are those that the first one has."""

    def records() -> Iterator[dict[str, Any] | str]:
        for line in lines(stream, part.start, part.stop):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield {name: value.get(source) for name, source in columns.items()}
            else:
                yield line[:EXAMPLE_CHARS].decode("utf-8", "replace")

    yield from _chunks(records(), list(columns))


def read_parquet(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """COYO, LAION, DataComp and every other parquet that has a url and a caption column."""
    file = pq.ParquetFile(stream)
    groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
    for batch in file.iter_batches(ROWS_PER_CHUNK, list(groups), columns=list(columns.values()), use_threads=False):
        if not set(columns.values()) <= set(batch.schema.names):
            raise UserError("its columns are not those that its footer names: the file is damaged")
        yield Chunk(pa.table({name: batch.column(source) for name, source in columns.items()}))


def read_sbu_json(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """SBU: one object of equally long lists, `image_urls` and `captions`; read whole (860,000 rows)."""
    value = _json_object(stream, "image_urls", "captions")
    records = ({"url": url, "caption": text} for url, text in zip(value["image_urls"], value["captions"], strict=False))
    yield from _chunks(records, ["url", "caption"])


def read_coco_json(stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]) -> Iterator[Chunk]:
    """COCO captions: `images` with `coco_url`, `annotations` with `image_id` and `caption`; read whole."""
    value = _json_object(stream, "images", "annotations")
    images = {image["id"]: image for image in value["images"]}
    empty: dict[str, Any] = {}

    def records() -> Iterator[dict[str, Any]]:
        for annotation in value["annotations"]:
            image = images.get(annotation.get("image_id"), empty)
            size = {"width": image.get("width"), "height": image.get("height")}
            yield {"url": image.get("coco_url"), "caption": annotation.get("caption"), **size}

    yield from _chunks(records(), ["url", "caption", "width", "height"])


Reader = Callable[[BinaryIO, Range, Sequence[str], Mapping[str, str]], Iterator[Chunk]]
READERS: Mapping[str, Reader] = {
    "tsv": read_tsv,
    "csv": read_csv,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "sbu-json": read_sbu_json,
    "coco-json": read_coco_json,
}


def find_columns(names: Sequence[str], choice: ColumnChoice) -> dict[str, str]:
    """Canonical name -> the list's own name, for the url, the caption and the carried columns present.

    Raises UserError when the url or caption column is not among `names`.
    """
    lower = {name.lower(): name for name in reversed(names)}
    columns = {
        "url": _required(names, lower, choice.url, URL_NAMES, "--url-column"),
        "caption": _required(names, lower, choice.caption, CAPTION_NAMES, "--caption-column"),
    }
    for canonical, aliases in CARRIED.items():
        found = next((lower[alias] for alias in aliases if alias in lower), None)
        if found is not None and found not in columns.values():
            columns[canonical] = found
    return columns


def _required(
    names: Sequence[str], lower: Mapping[str, str], chosen: str | None, usual: Sequence[str], flag: str
) -> str:
    if chosen is not None:
        if chosen not in names:
            raise UserError(f"no column {chosen!r}{nearest_of(chosen, names)}")
        return chosen
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None:
        raise UserError(f"no column named {' or '.join(usual)}: name it with {flag}{nearest_of(usual[0], names)}")
    return found


def _json_object(stream: BinaryIO, *keys: str) -> dict[str, Any]:
    try:
        value = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON file: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in keys):
        raise UserError(f"not an object with the lists {' and '.join(keys)}")
    return value


def _chunks(records: Iterable[dict[str, Any] | str], columns: Sequence[str]) -> Iterator[Chunk]:
    """Gather parsed records (text: a malformed line) into tables of text columns."""
    rows: list[dict[str, Any]] = []
    malformed: list[str] = []
    for record in records:
        if isinstance(record, str):
            malformed.append(record[:EXAMPLE_CHARS])
        else:
            rows.append(record)
        if len(rows) + len(malformed) == ROWS_PER_CHUNK:
            yield _chunk(_table(rows, columns), malformed)
            rows, malformed = [], []
    if rows or malformed:
        yield _chunk(_table(rows, columns), malformed)


def _chunk(table: pa.Table, malformed: Sequence[str]) -> Chunk:
    return Chunk(table, len(malformed), tuple(text[:EXAMPLE_CHARS] for text in malformed[:EXAMPLES_PER_CHUNK]))


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pa.Table:
    return pa.table({name: pa.array([_bytes(row.get(name)) for row in rows], pa.binary()) for name in columns})


def _bytes(value: object) -> bytes | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    # surrogateescape gives an undecodable byte back as it was, surrogatepass a lone JSON \ud800: neither is UTF-8
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"\xff"
