"""Encoded pictures -> pixels, by one rule for every reader: limits before decoding, upright, RGB of 8 bits.

What is transparent lies on white; 16 bits are scaled to 8; of an animation the first picture counts; colour profiles
and other metadata change nothing. JPEGs are decoded by libjpeg-turbo, what it does not take and all else by Pillow.

Arrays: H, W = pixel rows and columns, C = RGB.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

Pixels: TypeAlias = npt.NDArray[np.uint8]
Format: TypeAlias = Literal["jpg", "png", "webp", "gif"]

# What a shard may hold. GIFs are taken from the web alone, and become JPEGs.
SHARD_FORMATS: tuple[Format, ...] = ("jpg", "png", "webp")
MAX_PIXELS = 25_000_000
MAX_SIDE = 16_384
# A progressive JPEG goes over all its pixels once for each scan, and a scan may be 40 bytes: 20 MB could take hours.
MAX_SCANNED_PIXELS = 5_000_000_000

_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WebP", "gif": "GIF"}
_PNG_START = b"\x89PNG\r\n\x1a\n"
# What says which pixels there are, and which way up; text, profiles, animations and the like can be of any size.
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"})
_START_OF_SCAN = b"\xff\xda"
_LEAST_SCAN_BYTES = 10  # of its header alone: a small file need not be searched
_SOI, _EOI, _SOS, _EXIF = 0xD8, 0xD9, 0xDA, 0xE1
_EXIF_NAME = b"Exif\x00\x00"
_ORIENTATION_TAG = 0x0112
# JFIF and Adobe segments say how to read the colours; all other APPn segments and comments are metadata
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
# in entropy-coded data 0xFF is followed by 0x00 or a restart marker: anything else is the next segment
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# orientation tag -> (quarters to turn left, whether to mirror afterwards)
_UPRIGHT = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
_WHITE = 255


class ImageError(ValueError):
    """An encoded picture that cannot be used; says why."""


class ImageTooLargeError(ImageError):
    """The header announces more pixels than the limits allow; nothing was decoded."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a picture says of itself before it is decoded.

    width, height: as stored, before it is turned upright
    turn: the EXIF orientation, 1 to 8; 1 is upright
    is_turbo: whether it is a JPEG that libjpeg-turbo decodes to RGB
    """

    format: Format
    width: int
    height: int
    turn: int
    is_turbo: bool

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as a person sees it: a quarter's turn swaps them."""
        return (self.height, self.width) if self.turn >= 5 else (self.width, self.height)


def picture_format(data: bytes, formats: tuple[Format, ...] = SHARD_FORMATS) -> Format | None:
    """Which of the formats a file is in, by its first bytes, whatever its name; None for none of them."""
    kind: Format | None = None
    if data.startswith(b"\xff\xd8\xff"):
        kind = "jpg"
    elif data.startswith(_PNG_START):
        kind = "png"
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        kind = "gif"
    return kind if kind in formats else None


def read_header(
    data: bytes,
    *,
    formats: tuple[Format, ...] = SHARD_FORMATS,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
) -> Header:
    """Size and orientation, without decoding.

    Raises ImageTooLargeError beyond the limits, or ImageError for bytes that are in none of the formats.
    """
    kind = picture_format(data, formats)
    if kind is None:
        *others, last = (_NAMES[name] for name in formats)
        raise ImageError(f"not a {', '.join(others)} or {last}: {_start(data)}")
    header = _turbo_header(data) if kind == "jpg" else None
    if header is None:
        with _opened(data, kind) as image:
            turn = jpeg_orientation(data) if kind == "jpg" else _orientation_of(image.info.get("exif", b""))
            header = Header(kind, image.width, image.height, turn, is_turbo=False)
    if header.width * header.height > max_pixels or max(header.width, header.height) > max_side:
        raise ImageTooLargeError(f"{header.width} x {header.height} pixels")
    if kind == "jpg" and len(data) // _LEAST_SCAN_BYTES * header.width * header.height > MAX_SCANNED_PIXELS:
        # counted by their mark, wherever it is: in metadata it occurs by chance, far less often than it may
        scans = data.count(_START_OF_SCAN)
        if scans * header.width * header.height > MAX_SCANNED_PIXELS:
            raise ImageTooLargeError(f"{scans} scans of {header.width} x {header.height} pixels")
    return header


def decode_picture(data: bytes) -> Pixels:
    """A picture of a shard or a set: uint8 RGB [H, W, C], as a person would see it on white.

    Raises ImageTooLargeError, or ImageError for bytes that are no JPEG, PNG or WebP, or are damaged or cut short.
    """
    header = read_header(data)
    pixels_HWC = decode_jpeg(data) if header.is_turbo else None
    if pixels_HWC is None:
        pixels_HWC = decode_slowly(data, header)
    return np.ascontiguousarray(upright(pixels_HWC, header.turn))


def decode_jpeg(data: bytes, width: int = 1, height: int = 1, shrink_by: float = 1.0) -> Pixels | None:
    """RGB by libjpeg-turbo, as stored; None where Pillow has to decide: stray bytes that do no harm, or damage.

    To be shrunk by 2 or more, it comes at 1/2, 1/4 or 1/8 of its size, at least `width` x `height`.
    """
    scaled = {"min_width": width, "min_height": height, "min_factor": 2} if shrink_by >= 2 else {}
    try:
        pixels_HWC: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **scaled)
    except ValueError:
        return None
    return pixels_HWC


def decode_slowly(data: bytes, header: Header) -> Pixels:
    """RGB by Pillow, as stored: every kind of picture. Raises ImageError for one that does not decode to its end."""
    with _opened(data, header.format) as image:
        try:
            return _as_rgb(image)
        except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, …
            raise ImageError(f"does not decode: {_one_line(error)}") from error


def check_picture(data: bytes) -> None:
    """Raise what `decode_picture` would, in less time."""
    header = read_header(data)
    if header.is_turbo:
        try:
            # An eighth of the size, in grey, is a third faster to make. The entropy decoder, which is what notices
            # damage, still reads every bit of every channel; after it nothing can fail.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)
        except ValueError:
            pass  # strict also refuses stray bytes that do no harm: Pillow, which refuses missing data only, decides
        else:
            return
    decode_slowly(data, header)


def upright(pixels_HWC: Pixels, turn: int) -> Pixels:
    """Rows as a camera's EXIF orientation wants them seen."""
    if turn not in _UPRIGHT:
        return pixels_HWC
    quarters, is_mirrored = _UPRIGHT[turn]
    turned_HWC = np.rot90(pixels_HWC, quarters)
    return turned_HWC[:, ::-1] if is_mirrored else turned_HWC


def why_unusual(data: bytes) -> str | None:
    """Why a reader without this rule may see another picture: turned, transparent, 16 bits, CMYK; None if it may not.

    Raises ImageError as `read_header` does.
    """
    header = read_header(data)
    if header.turn != 1:
        return "turned by EXIF"
    if header.is_turbo:
        return None
    with _opened(data, header.format) as image:
        if getattr(image, "is_animated", False) and header.format != "jpg":
            return "animated"
        if image.has_transparency_data:
            return "transparent"
        if image.mode.startswith("I"):
            return "16 bits"
        return image.mode if image.mode not in ("RGB", "L", "P", "1") else None


def without_metadata(data: bytes) -> bytes:
    """The same JPEG, bit by bit, without EXIF, XMP, thumbnails, colour profiles, comments, and what follows its end.

    Raises ValueError when the bytes do not have a JPEG's structure.
    """
    kept = [segment for marker, segment in _jpeg_segments(data) if marker not in _JPEG_METADATA]
    return b"".join((bytes((0xFF, _SOI)), *kept))


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8; 1 where there is none or it cannot be read."""
    position = 2
    while True:  # not _jpeg_segments, which looks for the end of the pixels: every picture comes by here
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        head = data[position : position + 4]
        length = int.from_bytes(head[2:], "big")
        if len(head) < 4 or head[0] != 0xFF or head[1] == _SOS or length < 2:
            return 1
        end = position + 2 + length
        if head[1] == _EXIF and data[position + 4 : position + 10] == _EXIF_NAME:
            return _orientation_of(data[position + 4 : end])
        position = end


def _orientation_of(exif_bytes: bytes) -> int:
    try:
        exif = Image.Exif()
        exif.load(exif_bytes)
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow's reader raises many things at hostile metadata; the pixels may be fine all the same
        return 1
    return value if value in range(1, 9) else 1


def _turbo_header(data: bytes) -> Header | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # Pillow decides
    return Header("jpg", width, height, jpeg_orientation(data), True) if colours in ("YCbCr", "Gray", "RGB") else None


def _opened(data: bytes, kind: Format) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_pixels_alone(data, kind)), formats=(_NAMES[kind].upper(),))
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(_one_line(error)) from error
    except Exception as error:  # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error, …
        reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else _one_line(error)
        raise ImageError(f"does not decode as {_NAMES[kind]}: {reason}") from error


def _pixels_alone(data: bytes, kind: Format) -> bytes:
    """A file without the metadata of a PNG or JPEG, at which Pillow may fail or take long; damage is left to Pillow."""
    try:
        if kind == "png":
            return _png_without_metadata(data)
        if kind == "jpg":
            return without_metadata(data)
    except ValueError:
        pass
    return data


def _png_without_metadata(data: bytes) -> bytes:
    kept, position = [_PNG_START], len(_PNG_START)
    while position < len(data):
        if position + 12 > len(data):
            raise ValueError("cut short")
        (size,) = struct.unpack_from(">I", data, position)
        name, end = data[position + 4 : position + 8], position + 12 + size
        if end > len(data):
            raise ValueError("cut short")
        if name in _PNG_KEPT:
            kept.append(data[position:end])
        if name == b"IEND":
            break
        position = end
    return b"".join(kept)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, whole segment) in the order of the file, entropy-coded data belonging to its SOS, EOI last.

    Raises ValueError when the bytes do not follow this structure to the end-of-image marker.
    """
    if data[:2] != bytes((0xFF, _SOI)):
        raise ValueError("no start-of-image marker")
    position = 2
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        head = data[position : position + 4]
        if head[:2] == bytes((0xFF, _EOI)):
            yield _EOI, head[:2]
            return
        length = int.from_bytes(head[2:], "big")
        if len(head) < 4 or head[0] != 0xFF or length < 2:
            raise ValueError(f"no segment at byte {position}")
        end = position + 2 + length
        if head[1] == _SOS:
            following = _NEXT_MARKER.search(data, end)
            if following is None:
                raise ValueError("no end-of-image marker")
            end = following.start()
        yield head[1], data[position:end]
        position = end


def _as_rgb(image: Image.Image) -> Pixels:
    image.load()
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (_WHITE, _WHITE, _WHITE, 255))
        return np.array(Image.alpha_composite(canvas, rgba).convert("RGB"))
    return np.array(image.convert("RGB"))


def _from_16_bits(image: Image.Image) -> Pixels:
    """Grey of 16 bits, which Pillow's own conversion would clip at 255."""
    levels_HW = np.asarray(image).astype(np.uint32)
    grey_HW = (levels_HW >> 8).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey_HW[levels_HW == transparent] = _WHITE
    return np.repeat(grey_HW[..., None], 3, axis=2)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _start(data: bytes) -> str:
    return repr(data[:24])[1:] if data else "no bytes at all"
