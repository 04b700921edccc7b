"""JPEG files as sequences of segments: reading the orientation, and leaving out metadata without re-encoding."""

from __future__ import annotations

import re
from collections.abc import Iterator

from PIL import Image

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
EXIF_MARKER, EXIF_NAME = 0xE1, b"Exif\x00\x00"
ORIENTATION_TAG = 0x0112
# JFIF and Adobe segments say how to read the colours; all other APPn segments and comments are metadata
_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
# in entropy-coded data 0xFF is followed by 0x00 or a restart marker: anything else is the next segment
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, whole segment) in the order of the file, entropy-coded data belonging to its SOS, EOI last.

    Raises ValueError when the bytes do not follow this structure to the end-of-image marker.
    """
    if data[:2] != bytes((0xFF, SOI)):
        raise ValueError("no start-of-image marker")
    position = 2
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        head = data[position : position + 4]
        if head[:2] == bytes((0xFF, EOI)):
            yield EOI, head[:2]
            return
        length = int.from_bytes(head[2:], "big")
        if len(head) < 4 or head[0] != 0xFF or length < 2:
            raise ValueError(f"no segment at byte {position}")
        end = position + 2 + length
        if head[1] == SOS:
            following = _NEXT_MARKER.search(data, end)
            if following is None:
                raise ValueError("no end-of-image marker")
            end = following.start()
        yield head[1], data[position:end]
        position = end


def without_metadata(data: bytes) -> bytes:
    """The same picture, bit by bit, without EXIF, XMP, thumbnails, colour profiles, comments, and what follows its end.

    Raises ValueError as `segments` does.
    """
    kept = [segment for marker, segment in segments(data) if marker not in _METADATA]
    return b"".join((bytes((0xFF, SOI)), *kept))


def orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        for marker, segment in segments(data):
            if marker == SOS:
                break
            if marker == EXIF_MARKER and segment[4:10] == EXIF_NAME:
                exif = Image.Exif()
                exif.load(segment[4:])
                value = exif.get(ORIENTATION_TAG, 1)
                return value if value in range(1, 9) else 1
    except Exception:  # Pillow's reader raises many things at hostile metadata; the pixels may be fine all the same
        return 1
    return 1
