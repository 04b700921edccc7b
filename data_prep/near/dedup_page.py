"""The page of `data-prep dedup`: what was found, with the pictures of some pairs side by side."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.near.picture_hashes import PictureFile
from formats.files import write_atomically
from formats.pages import data_uri, render
from formats.pictures import decode_picture

THUMBNAIL_PIXELS = 160
TEMPLATE = Path(__file__).parents[1] / "templates" / "dedup.html.j2"

Located = tuple[PictureFile, str]  # where a picture is: its file and its key there


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two pictures that are near to each other; the sample is what would be removed."""

    sample: Located
    near: Located
    distance: int
    in_evaluation: bool


def write_page(path: Path, name: str, summary: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
    """Write the page with the pictures of `pairs`."""
    thumbnails = _read_thumbnails({place for pair in pairs for place in (pair.sample, pair.near)})
    shown = [
        {
            "distance": pair.distance,
            "in_evaluation": pair.in_evaluation,
            "sides": [(_label(place), thumbnails.get(place, "")) for place in (pair.sample, pair.near)],
        }
        for pair in pairs
    ]
    write_atomically(path, render(TEMPLATE, {"name": name, "summary": summary, "pairs": shown}))


def _label(place: Located) -> str:
    file, key = place
    return f"{'/'.join(file.directory.resolve().parts[-2:])}/{file.name} {key}"


def _read_thumbnails(places: set[Located]) -> dict[Located, str]:
    wanted: dict[PictureFile, set[str]] = {}
    for file, key in places:
        wanted.setdefault(file, set()).add(key)
    found = {}
    for file, keys in wanted.items():
        remaining = set(keys)
        for key, data in file.pictures():
            if key in remaining:
                found[(file, key)] = _thumbnail(data)
                remaining.remove(key)
            if not remaining:
                break
    return found


def _thumbnail(data: bytes) -> str:
    image = Image.fromarray(decode_picture(data))
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return data_uri(stream.getvalue(), "image/jpeg")
