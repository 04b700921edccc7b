from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import simplejpeg
from make_images import encoded, jpeg_of_many_scans, png_bomb
from PIL import Image

from formats.pictures import ImageError, ImageTooLargeError, check_picture, picture_format


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_whole_images_pass(kind: str, extension: str) -> None:
    data = encoded(kind=kind)
    assert picture_format(data) == extension
    check_picture(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_off_images_are_refused(kind: str, share: float) -> None:
    data = encoded(kind=kind)
    with pytest.raises(ImageError):
        check_picture(data[: int(len(data) * share)])


def test_a_jpeg_without_its_last_two_bytes_is_refused() -> None:
    with pytest.raises(ImageError):
        check_picture(encoded()[:-2])


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    check_picture(encoded() + b"appended by a camera")


def test_a_cmyk_jpeg_passes() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(stream, "JPEG")
    check_picture(stream.getvalue())


@pytest.mark.parametrize(("width", "height"), [(19_000, 19_000), (5_001, 5_000), (16_385, 1)])
def test_too_many_pixels_are_refused_by_the_header_alone(width: int, height: int) -> None:
    # the data holds no such picture: decoding would say that it is damaged, not that it is too large
    with pytest.raises(ImageTooLargeError):
        check_picture(png_bomb(width, height))


def test_many_scans_are_refused_only_where_they_take_long() -> None:
    check_picture(jpeg_of_many_scans(side=64, scans=500))
    with pytest.raises(ImageTooLargeError, match="scans of 4000 x 4000 pixels"):
        check_picture(jpeg_of_many_scans(side=4000, scans=500))


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"GIF89a" + bytes(20), b"\xff\xd8\xff", b"RIFF"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        check_picture(data)


def pictures(rng: np.random.Generator) -> list[bytes]:
    """JPEGs of several kinds: subsamplings, grey, progressive, with restart markers, optimised."""
    pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((112, 80), Image.Resampling.BICUBIC)
    options: list[dict[str, Any]] = [
        {"subsampling": 0},
        {"subsampling": 2, "quality": 95},
        {"progressive": True},
        {"progressive": True, "quality": 95, "subsampling": 0},
        {"restart_marker_rows": 1},
        {"optimize": True, "quality": 40},
    ]
    found = []
    for image in (smooth, smooth.convert("L")):
        for option in options:
            stream = io.BytesIO()
            image.save(stream, "JPEG", **option)
            found.append(stream.getvalue())
    return found


def test_damage_that_a_full_decode_finds_is_found() -> None:
    """Decoding small and grey gives the same verdict as decoding every pixel in colour, whatever is broken."""
    rng = np.random.default_rng(0)
    sound = pictures(rng)
    verdicts = Counter[bool]()
    for data in sound:
        check_picture(data)
        for damaged in damage(data, rng):
            try:
                simplejpeg.decode_jpeg(damaged, strict=True)
            except ValueError:
                fully = False
            else:
                fully = True
            assert quick_verdict(damaged) == fully
            verdicts[fully] += 1
    assert min(verdicts.values()) > 200  # both kinds were met


def quick_verdict(data: bytes) -> bool:
    """What the first, quick decode of `check_picture` says."""
    with mock.patch("formats.pictures.decode_slowly", side_effect=ImageError):
        try:
            check_picture(data)
        except ImageError:
            return False
    return True


def damage(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Cuts, flipped bits, overwritten and missing and doubled stretches."""
    for _ in range(30):
        start, length = (int(rng.integers(2, len(data))), int(rng.integers(1, 40)))
        garbage = rng.bytes(length)
        yield data[:start]
        yield data[:start] + bytes([data[start] ^ (1 << int(rng.integers(8)))]) + data[start + 1 :]
        yield data[:start] + garbage + data[start + length :]
        yield data[:start] + data[start + length :]
        yield data[: start + length] + data[start:]
