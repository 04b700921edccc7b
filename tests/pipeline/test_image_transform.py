"""Decoding within limits, and resizing close to Pillow's."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from formats.pictures import ImageError
from pipeline.data.image_transform import (
    decode_image,
    random_crop_box,
    random_resized_crop,
    resize_center_crop,
)


def encoded(mode: str, file_format: str) -> bytes:
    pixels = Image.open(io.BytesIO(jpeg_bytes(3, 50, 30))).convert(mode)
    buffer = io.BytesIO()
    pixels.save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP")],
)
def test_kinds_of_images(mode: str, file_format: str) -> None:
    image = decode_image(encoded(mode, file_format))
    assert image.shape == (3, 30, 50)
    assert image.dtype == torch.uint8


def test_rgb_jpeg_equals_pillow() -> None:
    data = jpeg_bytes(5, 200, 120)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert (decode_image(data).int() - expected.int()).abs().max() <= 3  # other upsampling of chroma


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not an image</html>",
        jpeg_bytes(1)[: len(jpeg_bytes(1)) // 2],
        jpeg_bytes(1)[:20],
        png_header(19_000, 19_000),
        png_header(20_000, 10),
        encoded("RGB", "GIF"),
        encoded("RGB", "PNG")[:-30],
    ],
    ids=["empty", "html", "half a jpeg", "jpeg header", "bomb", "too wide", "gif", "cut png"],
)
def test_what_cannot_be_used_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


@pytest.mark.parametrize(("width", "height"), [(50, 30), (30, 50), (224, 224), (90, 91), (7, 3)])
def test_center_crop_is_pillows_to_the_bit(width: int, height: int) -> None:
    data = jpeg_bytes(2, width, height)
    ours = resize_center_crop(decode_image(data), 32)
    assert ours.shape == (3, 32, 32)
    image = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    short = min(width, height)
    image = image.resize((int(32 * width / short), int(32 * height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
    expected = torch.from_numpy(np.array(image.crop((left, top, left + 32, top + 32)))).permute(2, 0, 1)
    assert ours.equal(expected)


def test_random_crops_follow_their_generator_and_keep_their_area() -> None:
    image = decode_image(jpeg_bytes(4, 80, 60))
    first = random_resized_crop(image, 32, 0.5, random.Random(1))
    assert torch.equal(first, random_resized_crop(image, 32, 0.5, random.Random(1)))
    assert not torch.equal(first, random_resized_crop(image, 32, 0.5, random.Random(2)))
    # a picture that says where it was cut: red grows to the right, green downwards
    ramp = torch.zeros(3, 200, 200, dtype=torch.uint8)
    ramp[0], ramp[1] = torch.arange(200), torch.arange(200)[:, None]
    for seed in range(30):
        crop = random_resized_crop(ramp, 50, 0.64, random.Random(seed)).int()
        width, height = (int(crop[c].max() - crop[c].min()) for c in (0, 1))
        assert width * height > 0.55 * 200 * 200
        assert 0.65 < width / height < 1.55


@given(st.integers(1, 900), st.integers(1, 900), st.floats(0.05, 1, exclude_min=True), st.integers(0, 10**6))
def test_crop_boxes_lie_inside_and_keep_their_area(height: int, width: int, min_area: float, seed: int) -> None:
    top, left, h, w = random_crop_box(height, width, min_area, random.Random(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0
    # of an image within 3:4, a crop never falls short of the area, but for rounding; a middle is all of it
    if 3 * height <= 4 * width and 3 * width <= 4 * height:
        assert (h + 1) * (w + 1) > min_area * height * width
    assert 3 * (h - 1) <= 4 * (w + 1)
    assert 3 * (w - 1) <= 4 * (h + 1)


def test_a_wide_image_that_no_crop_fits_gives_its_middle() -> None:
    """As torchvision: of 4:1, at least 90 % within 3:4 is impossible."""
    assert random_crop_box(100, 400, 0.9, random.Random(0)) == (0, 133, 100, 133)
    assert random_crop_box(400, 100, 0.9, random.Random(0)) == (133, 0, 133, 100)


def test_a_sliver_is_cropped_before_it_is_enlarged() -> None:
    """16,384 x 1 pixels would be 2.5 GB at a height of 224."""
    sliver = torch.arange(16_384, dtype=torch.float32).div(65).to(torch.uint8).expand(3, 1, 16_384)
    square = resize_center_crop(sliver, 224)
    assert square.shape == (3, 224, 224)
    assert (square.float() - 8192 / 65).abs().max() <= 2
