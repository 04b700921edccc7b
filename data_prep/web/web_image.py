"""A downloaded file -> the JPEG that goes into a shard: scaled down, upright, without metadata.

Arrays: H, W = pixel rows and columns, C = RGB.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import simplejpeg

from data_prep.boxes import Boxes
from data_prep.web.ledger import DECODE, TOO_LARGE, FetchError
from formats import pictures
from formats.pictures import Header, ImageError, ImageTooLargeError, Pixels

# More than a shard may hold: most are scaled down.
MAX_PIXELS = 50_000_000
MAX_SIDE = 1 << 15
MAX_ASPECT_RATIO = 20.0
QUALITY = 95
FORMATS: tuple[pictures.Format, ...] = ("jpg", "png", "webp", "gif")
RESIZE_MODES = ("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no")
WHITE = 255
LARGEST_SHARE = 2.0  # detectors put edges outside the picture; a box that is smaller in pixels is read as a large share
BLUR_MARGIN = 0.1  # of a box's longer side, as in the obfuscation of ImageNet's faces (arXiv 2103.06191)


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
    What `boxes` (see `read_boxes`) hold of the stored rows is blurred. A JPEG that fits already keeps its pixels bit
    by bit. The first picture of an animation counts.

    Raises FetchError: `too-large` by the header, `decode` for bytes that are no image, damaged, or a thin strip.
    """
    try:
        header = pictures.read_header(data, formats=FORMATS, max_pixels=MAX_PIXELS, max_side=MAX_SIDE)
        return _to_jpeg(data, header, image_size, resize_mode, boxes)
    except ImageTooLargeError as error:
        raise FetchError(TOO_LARGE, str(error)) from error
    except ImageError as error:
        raise FetchError(DECODE, str(error)) from error


def _to_jpeg(data: bytes, header: Header, image_size: int, resize_mode: str, boxes: Boxes) -> WebImage:
    width, height = header.width, header.height
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"a strip of {width} x {height} pixels")
    target = _target(width, height, image_size, resize_mode)
    if header.is_turbo and target == (width, height) and header.turn == 1 and not boxes:
        kept = _kept(data)
        if kept is not None:
            return WebImage(kept, width, height, width, height)
    shrink_by = min(width / target[0], height / target[1])
    pixels_HWC = pictures.decode_jpeg(data, *target, shrink_by) if header.is_turbo else None
    if pixels_HWC is None:
        pixels_HWC = pictures.decode_slowly(data, header)
    pixels_HWC = shrink(pixels_HWC, *target)
    if boxes:
        pixels_HWC = blur_boxes(pixels_HWC, _as_shares(boxes, width, height))
    if target != (width, height):
        pixels_HWC = _fit_square(pixels_HWC, image_size, resize_mode)
    pixels_HWC = np.ascontiguousarray(pictures.upright(pixels_HWC, header.turn))
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


def _as_shares(boxes: Boxes, width: int, height: int) -> Boxes:
    is_in_pixels = max(edge for box in boxes for edge in box) > LARGEST_SHARE
    scales = (width, height, width, height) if is_in_pixels else (1, 1, 1, 1)
    return [[edge / scale for edge, scale in zip(box, scales, strict=True)] for box in boxes]


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
        longest = min(max(longest, right - left, bottom - top), max(width, height))  # of a box far beyond the picture
        rows = slice(max(0, int(top - margin)), max(0, int(np.ceil(bottom + margin))))
        columns = slice(max(0, int(left - margin)), max(0, int(np.ceil(right + margin))))
        mask_HW[rows, columns] = 1
    sigma = BLUR_MARGIN * longest
    share_HW1 = cv2.GaussianBlur(mask_HW, (0, 0), sigma)[..., None]
    blurred_HWC = cv2.GaussianBlur(pixels_HWC, (0, 0), sigma)
    return np.rint(pixels_HWC * (1 - share_HW1) + blurred_HWC * share_HW1).astype(np.uint8)


def _target(width: int, height: int, image_size: int, resize_mode: str) -> tuple[int, int]:
    """Width and height after scaling, before a crop or a border."""
    if resize_mode == "no":
        side = min(width, height)
        if width * height > pictures.MAX_PIXELS or max(width, height) > pictures.MAX_SIDE:
            raise ImageTooLargeError(f"{width} x {height} pixels, and --resize-mode no")
        image_size = side
    side = min(width, height) if resize_mode in ("keep_ratio", "center_crop", "no") else max(width, height)
    scale = min(1.0, image_size / side)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _kept(data: bytes) -> bytes | None:
    """The picture as it is, if it decodes to its end, without what else is in the file."""
    try:
        return pictures.without_metadata(data) if pictures.decode_jpeg(data) is not None else None
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
