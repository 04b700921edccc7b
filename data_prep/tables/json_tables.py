"""Rows of JSON: a line or a list of objects, and the two forms in which lists of pictures were published."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from data_prep.tables.lines import Range, Refused, Row, lines, malformed
from formats.errors import UserError


def read_json_lines(
    stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Row | Refused]:
    """One JSON object per line."""
    for line in lines(stream, part.start, part.stop):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield _picked(value, columns) or malformed(line)


def read_json(
    stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Row | Refused]:
    """One JSON list of objects; read whole."""
    for value in load_json_list(stream):
        yield _picked(value, columns) or malformed(json.dumps(value).encode())


def load_json_list(stream: BinaryIO) -> list[Any]:
    """Raises UserError for a file that is not a JSON list."""
    value = _load_json(stream)
    if not isinstance(value, list):
        raise UserError("not a JSON list of objects")
    return value


def read_sbu_json(
    stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Row | Refused]:
    """SBU: one object of equally long lists, `image_urls` and `captions`; read whole (860,000 rows)."""
    value = _json_object(stream, "image_urls", "captions")
    urls, captions = value["image_urls"], value["captions"]
    if len(urls) != len(captions):
        raise UserError(f"not a whole list: {len(urls):,} image_urls, but {len(captions):,} captions")
    for url, caption in zip(urls, captions, strict=True):
        yield {"url": url, "caption": caption}


def read_coco_json(
    stream: BinaryIO, part: Range, names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Row | Refused]:
    """COCO captions: `images` with `coco_url`, `annotations` with `image_id` and `caption`; read whole."""
    value = _json_object(stream, "images", "annotations")
    images = {str(image.get("id")): image for image in value["images"] if isinstance(image, dict)}
    empty: dict[str, Any] = {}
    for annotation in value["annotations"]:
        if not isinstance(annotation, dict):
            yield malformed(json.dumps(annotation).encode())
            continue
        image = images.get(str(annotation.get("image_id")), empty)
        size = {"width": image.get("width"), "height": image.get("height")}
        yield {"url": image.get("coco_url"), "caption": annotation.get("caption"), **size}


def _picked(value: object, columns: Mapping[str, str]) -> Row | None:
    """The columns of a JSON object; None for anything else."""
    return {name: value.get(source) for name, source in columns.items()} if isinstance(value, dict) else None


def _load_json(stream: BinaryIO) -> Any:
    try:
        return json.load(stream)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON file: {error}") from error


def _json_object(stream: BinaryIO, *keys: str) -> dict[str, Any]:
    value = _load_json(stream)
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in keys):
        raise UserError(f"not an object with the lists {' and '.join(keys)}")
    return value
