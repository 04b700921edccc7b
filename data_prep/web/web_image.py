"""A downloaded file -> the JPEG that goes into a shard: limits before decoding, upright, scaled down, no metadata.

Arrays: H, W = pixel rows and columns, C = RGB.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from data_prep.web.jpeg_segments import orientation, without_metadata
from data_prep.web.ledger import DECODE, TOO_LARGE, FetchError
from formats import pictures

Pixels: TypeAlias = npt.NDArray[np.uint8]
Boxes: TypeAlias = Sequence[Sequence[float]]

MAX_PIXELS = 50_000_000
MAX_SIDE = 1 << 15
MAX_ASPECT_RATIO = 20.0
QUALITY = 95
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
RESIZE_MODES = ("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no")
WHITE = 255
BLUR_MARGIN = 0.1  # of a box's longer side, as in the obfuscation of ImageNet's faces (arXiv 2103.06191)
# orientation tag -> how to turn the stored rows upright
_UPRIGHT = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}


@dataclasses.dataclass(frozen=True)
class WebImage:
    """A JPEG as it goes into a shard, and the size that the original had."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def to_jpeg(data: bytes, image_size: int, resize_mode: str, boxes: Boxes = ()) -> WebImage:
    """Bring a file from the web into the form of a shard.

    `resize_mode` is one of img2dataset's (`RESIZE_MODES`): an image is scaled down to `image_size` pixels, never up.
    `boxes` are [left, top, right, bottom] as shares of the stored width and height; what they hold is blurred. A
    JPEG that fits already keeps its pixels bit by bit. The first picture of an animation counts.

    Raises FetchError: `too-large` by the header, `decode` for bytes that are no image, damaged, or a thin strip.
    """
    width, height, is_plain_jpeg = _header(data)
    _check(data, width, height)
    target = _target(width, height, image_size, resize_mode)
    turn = orientation(data) if pictures.image_extension(data) == "jpg" else 1
    if is_plain_jpeg and target == (width, height) and turn == 1 and not boxes:
        pixels_HWC = _decode_jpeg(data, 1, 1)
        kept = _kept(data)
        if pixels_HWC is not None and kept is not None:
            return WebImage(kept, width, height, width, height)
    shrink_by = min(width / target[0], height / target[1])
    pixels_HWC = _decode_jpeg(data, *target, shrink_by) if is_plain_jpeg else None
    if pixels_HWC is None:
        pixels_HWC = _decode_with_pillow(data)
    pixels_HWC = shrink(pixels_HWC, *target)
    if boxes:
        pixels_HWC = blur_boxes(pixels_HWC, boxes)
    if target != (width, height):
        pixels_HWC = _fit_square(pixels_HWC, image_size, resize_mode)
    pixels_HWC = np.ascontiguousarray(_upright(pixels_HWC, turn))
    encoded = simplejpeg.encode_jpeg(pixels_HWC, quality=QUALITY, colorsubsampling="420")
    return WebImage(encoded, pixels_HWC.shape[1], pixels_HWC.shape[0], width, height)


def shrink(pixels_HWC: Pixels, width: int, height: int) -> Pixels:
    """Scale down to width x height.

    By up to 2: a Gaussian against aliasing, then bicubic, which is as close to Pillow's filters as the mean over
    areas is, at a third of its time; the width of the Gaussian was fitted to them. By more: mean over areas.
    """
    factor = max(pixels_HWC.shape[1] / width, pixels_HWC.shape[0] / height)
    if factor == 1:
        return pixels_HWC
    if factor > 2:
        return cv2.resize(pixels_HWC, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    soft_HWC = cv2.GaussianBlur(pixels_HWC, (3, 3), 0.74 * (factor - 1) ** 0.36)
    return cv2.resize(soft_HWC, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)


def blur_boxes(pixels_HWC: Pixels, boxes: Boxes) -> Pixels:
    """Blur what the boxes hold and a margin around it, with soft edges.

    Raises FetchError when a box is not four numbers: an unblurred image is worse than none.
    """
    height, width = pixels_HWC.shape[:2]
    edges = np.asarray(boxes, np.float64)
    if edges.ndim != 2 or edges.shape[1] != 4 or not np.isfinite(edges).all():
        raise FetchError(DECODE, "a box to blur is not [left, top, right, bottom]")
    mask_HW = np.zeros((height, width), np.float32)
    longest = 1.0
    for left, top, right, bottom in edges * (width, height, width, height):
        margin = BLUR_MARGIN * max(right - left, bottom - top)
        longest = max(longest, right - left, bottom - top)
        rows = slice(max(0, int(top - margin)), max(0, int(np.ceil(bottom + margin))))
        columns = slice(max(0, int(left - margin)), max(0, int(np.ceil(right + margin))))
        mask_HW[rows, columns] = 1
    sigma = BLUR_MARGIN * longest
    share_HW1 = cv2.GaussianBlur(mask_HW, (0, 0), sigma)[..., None]
    blurred_HWC = cv2.GaussianBlur(pixels_HWC, (0, 0), sigma)
    return np.rint(pixels_HWC * (1 - share_HW1) + blurred_HWC * share_HW1).astype(np.uint8)


def _header(data: bytes) -> tuple[int, int, bool]:
    """Width, height, and whether libjpeg-turbo reads it: from the header alone."""
    if pictures.image_extension(data) == "jpg":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray"):
                return width, height, True
        except ValueError:
            pass  # Pillow decides
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width, image.height, False
    except Image.DecompressionBombError as error:
        raise FetchError(TOO_LARGE, str(error)) from error
    except Exception as error:  # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error, …
        raise FetchError(DECODE, f"not a JPEG, PNG, WebP or GIF: {_start(data)}") from error


def _check(data: bytes, width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise FetchError(TOO_LARGE, f"{width} x {height} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise FetchError(DECODE, f"a strip of {width} x {height} pixels")
    if pictures.image_extension(data) == "jpg":
        try:
            pictures.check_scans(data, width, height)
        except pictures.ImageTooLargeError as error:
            raise FetchError(TOO_LARGE, str(error)) from error


def _target(width: int, height: int, image_size: int, resize_mode: str) -> tuple[int, int]:
    """Width and height after scaling, before a crop or a border."""
    if resize_mode == "no":
        side = min(width, height)
        if width * height > pictures.MAX_PIXELS or max(width, height) > pictures.MAX_SIDE:
            raise FetchError(TOO_LARGE, f"{width} x {height} pixels, and --resize-mode no")
        image_size = side
    side = min(width, height) if resize_mode in ("keep_ratio", "center_crop", "no") else max(width, height)
    scale = min(1.0, image_size / side)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _decode_jpeg(data: bytes, width: int, height: int, shrink_by: float = 1.0) -> Pixels | None:
    """Decode with libjpeg-turbo, at 1/2, 1/4 or 1/8 of the size where that is still enough; None: Pillow decides."""
    scaled = {"min_width": width, "min_height": height, "min_factor": 2} if shrink_by >= 2 else {}
    try:
        pixels_HWC: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **scaled)
    except ValueError:
        # strict also refuses stray bytes that do no harm
        return None
    return pixels_HWC


def _decode_with_pillow(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                canvas = Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, 255))
                return np.asarray(Image.alpha_composite(canvas, rgba).convert("RGB"))
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip
                grey_HW = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey_HW[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # as above
        raise FetchError(DECODE, f"does not decode: {str(error)[:200]}") from error


def _kept(data: bytes) -> bytes | None:
    try:
        return without_metadata(data)
    except ValueError:
        return None


def _fit_square(pixels_HWC: Pixels, side: int, resize_mode: str) -> Pixels:
    height, width = pixels_HWC.shape[:2]
    if resize_mode == "center_crop":
        top, left = (height - side) // 2, (width - side) // 2
        return pixels_HWC[top : top + side, left : left + side]
    if resize_mode == "border":
        top, left = (side - height) // 2, (side - width) // 2
        square_HWC = np.full((side, side, 3), WHITE, np.uint8)
        square_HWC[top : top + height, left : left + width] = pixels_HWC
        return square_HWC
    return pixels_HWC


def _upright(pixels_HWC: Pixels, turn: int) -> Pixels:
    quarters, mirrored = _UPRIGHT.get(turn, (0, False))
    turned_HWC = np.rot90(pixels_HWC, quarters)
    return turned_HWC[:, ::-1] if mirrored else turned_HWC


def _start(data: bytes) -> str:
    return repr(data[:24])[1:] if data else "no bytes at all"
