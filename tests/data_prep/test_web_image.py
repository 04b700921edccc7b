"""From a file on the web to the JPEG in a shard, held against Pillow."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_images import encoded, jpeg_of_many_scans, png_bomb
from PIL import Image, ImageOps

from data_prep.web.ledger import FetchError
from data_prep.web.web_image import RESIZE_MODES, blur_boxes, shrink, to_jpeg
from formats.pictures import jpeg_orientation, without_metadata


def smooth(width: int, height: int) -> Image.Image:
    """Different in every corner and direction."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [
        np.sin(x / 7) * 90 + y / height * 70,
        np.cos(y / 5) * 90 + x / width * 70,
        (x + y) / (width + height) * 120,
    ]
    return Image.fromarray(np.stack([wave + 100 for wave in waves], -1).clip(0, 255).astype(np.uint8))


def photograph(width: int, height: int) -> np.ndarray:
    """Noise with the spectrum of photographs: amplitudes fall as 1/frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    phases = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    pixels = np.fft.irfft2(phases / frequency, (height, width)).transpose(1, 2, 0)
    return (pixels / pixels.std() * 45 + 128).clip(0, 255).astype(np.uint8)


def jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def signal_to_noise_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9)))


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("size", [256, 40])
def test_pictures_are_upright_and_forget_where_they_were_taken(tag: int, size: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = tag, "at home"
    data = jpeg(smooth(120, 80), exif=exif, comment=b"at home")
    result = to_jpeg(data, size, "keep_ratio")
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).resize((result.width, result.height), 3)
    assert signal_to_noise_db(opened(result.data), np.asarray(expected).astype(float)) > 30
    assert (result.original_width, result.original_height) == (120, 80)
    assert b"at home" not in result.data
    assert Image.open(io.BytesIO(result.data)).getexif() == {}


def test_a_jpeg_that_fits_keeps_its_pixels_bit_by_bit() -> None:
    for options in ({}, {"progressive": True}, {"optimize": True, "subsampling": 0}, {"restart_marker_blocks": 2}):
        data = jpeg(smooth(60, 50), icc_profile=b"p" * 70_000, comment=b"hello", **options)
        result = to_jpeg(data + b"a video behind it", 50, "keep_ratio")
        assert (opened(result.data) == opened(data)).all()
        assert len(result.data) < len(data) - 70_000
        assert not result.data.endswith(b"behind it")


@given(st.binary(max_size=200), st.integers(0, 5000), st.integers(0, 255))
def test_damaged_jpegs_never_do_worse_than_a_value_error(noise: bytes, position: int, byte: int) -> None:
    good = jpeg(smooth(24, 24), comment=b"x" * 50)
    position %= len(good)
    for data in (noise, good[:position], good[:position] + bytes([byte]) + good[position + 1 :], good[:9] + noise):
        assert jpeg_orientation(data) in range(1, 9)
        with contextlib.suppress(ValueError):
            assert len(without_metadata(data)) <= len(data)
        with contextlib.suppress(FetchError):
            assert to_jpeg(data, 16, "keep_ratio").data


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (90, 400), (64, 64), (30, 50), (100, 64), (1300, 900)])
def test_sizes_are_those_of_img2dataset(mode: str, kind: str, width: int, height: int) -> None:
    stream = io.BytesIO()
    smooth(width, height).save(stream, kind)
    result = to_jpeg(stream.getvalue(), 64, mode)
    side = {"keep_ratio": min, "center_crop": min, "no": lambda *_: 64}.get(mode, max)(width, height)
    scale = min(1.0, 64 / side)
    expected = (round(width * scale), round(height * scale))
    if side > 64 and mode in ("center_crop", "border"):
        expected = (64, 64)
    assert (result.width, result.height) == expected == Image.open(io.BytesIO(result.data)).size
    if mode == "border" and width > 64:
        assert opened(result.data)[0].min() > 240 or opened(result.data)[:, 0].min() > 240


@pytest.mark.parametrize("factor", [1.1, 1.37, 1.6, 1.95, 2.5, 4.0])
def test_scaling_is_as_close_to_pillows_filters_as_the_mean_over_areas(factor: float) -> None:
    import cv2

    pixels = photograph(320, 240)
    width, height = round(320 / factor), round(240 / factor)
    reference = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    area = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    plain = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    ours = signal_to_noise_db(shrink(pixels, width, height), reference)
    assert ours > signal_to_noise_db(area, reference) - 1
    assert ours > signal_to_noise_db(plain, reference)


def test_large_jpegs_are_decoded_small_and_look_the_same() -> None:
    picture = smooth(160, 120).resize((1600, 1200), Image.Resampling.BICUBIC)
    result = to_jpeg(jpeg(picture), 128, "keep_ratio")
    reference = np.asarray(picture.resize((171, 128), Image.Resampling.BICUBIC)).astype(float)
    assert signal_to_noise_db(opened(result.data), reference) > 27


def test_faces_are_blurred_before_anything_else_is_lost() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    box = [0.25, 0.25, 0.5, 0.5]
    blurred = blur_boxes(noise, [box])
    inside = np.s_[22:38, 32:58]
    assert blurred[inside].std() < noise[inside].std() / 3
    assert (blurred[60:, 90:] == noise[60:, 90:]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # boxes are of the stored rows: they turn with the picture
    result = opened(to_jpeg(jpeg(Image.fromarray(noise), exif=exif, subsampling=0), 256, "keep_ratio", [box]).data)
    assert result.shape == (120, 80, 3)
    assert result[34:56, 44:56].std() < noise.std() / 3
    for wrong in ([[0.1, 0.2, 0.3]], [[0, 0, float("nan"), 1]], [0.1, 0.2, 0.3, 0.4]):
        with pytest.raises(FetchError, match="box"):
            blur_boxes(noise, wrong)


def test_boxes_in_pixels_are_of_the_original() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    data = jpeg(Image.fromarray(noise), subsampling=0)
    in_shares = to_jpeg(data, 40, "keep_ratio", [[0.25, 0.25, 0.5, 0.5]])
    assert to_jpeg(data, 40, "keep_ratio", [[30, 20, 60, 40]]) == in_shares
    assert to_jpeg(data, 40, "keep_ratio", ()) != in_shares
    far = to_jpeg(data, 40, "keep_ratio", [[-1e30, 20, 1e30, 1e30]])  # takes no longer than others
    assert opened(far.data)[10:].std() < opened(data).std() / 3


@pytest.mark.parametrize(
    ("data", "outcome", "message"),
    [
        (png_bomb(19_000, 19_000), "too-large", "limit|pixels"),
        (png_bomb(12_000, 5_000), "too-large", "12000 x 5000"),
        (png_bomb(40_000, 2), "too-large", "40000 x 2"),
        (png_bomb(5000, 100), "decode", "strip"),
        (jpeg_of_many_scans(4000, 500), "too-large", "scans of 4000 x 4000"),
        (png_bomb(100, 100), "decode", "does not decode"),
        (b"", "decode", "no bytes at all"),
        (b"BM" + bytes(100), "decode", "not a JPEG"),
        (encoded(0)[:300], "decode", "decode|not a JPEG"),
    ],
)
def test_what_must_not_be_stored(data: bytes, outcome: str, message: str) -> None:
    with pytest.raises(FetchError, match=message) as caught:
        to_jpeg(data, 32, "keep_ratio")
    assert caught.value.outcome == outcome
