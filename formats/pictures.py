"""Encoded images: which format the bytes are, and whether they decode within limits."""

from __future__ import annotations

import io

import simplejpeg
from PIL import Image

MAX_PIXELS = 25_000_000
MAX_SIDE = 16_384
# A progressive JPEG goes over all its pixels once for each scan, and a scan may be 40 bytes: 20 MB could take hours.
MAX_SCANNED_PIXELS = 5_000_000_000
_START_OF_SCAN = b"\xff\xda"


class ImageError(Exception):
    """An encoded image that must not be trained on."""


class ImageTooLargeError(ImageError):
    """The header announces more pixels than the limits allow; nothing was decoded."""


def image_extension(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raise ImageTooLargeError for a JPEG whose scans would take too long to decode.

    Scans are counted by their mark, wherever it is: in metadata it occurs by chance, far less often than it may.
    """
    scans = data.count(_START_OF_SCAN)
    if scans * width * height > MAX_SCANNED_PIXELS:
        raise ImageTooLargeError(f"{scans} scans of {width} x {height} pixels")


def check_image(data: bytes) -> None:
    """Decode an image fully, its limits first from the header.

    Raises ImageTooLargeError, or ImageError for bytes that are no JPEG, PNG or WebP or do not decode to the end.
    """
    extension = image_extension(data)
    if extension is None:
        raise ImageError("not a JPEG, PNG or WebP")
    if extension == "jpg":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(width, height)
            check_scans(data, width, height)
            # An eighth of the size, in grey, is a third faster to make. The entropy decoder, which is what notices
            # damage, still reads every bit of every channel; after it nothing can fail.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)
        except ValueError:
            # strict also refuses stray bytes that do no harm: Pillow, which refuses missing data only, decides
            pass
        else:
            return
    _check_with_pillow(data, extension)


def _check_with_pillow(data: bytes, extension: str) -> None:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_size(*image.size)
            if extension == "jpg":
                check_scans(data, *image.size)
            image.load()
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(str(error)) from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, …
        raise ImageError(f"does not decode: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageTooLargeError(f"{width} x {height} pixels")
