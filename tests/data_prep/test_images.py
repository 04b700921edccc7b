from __future__ import annotations

import io

import pytest
from make_images import encoded, png_bomb
from PIL import Image

from data_prep.images import ImageError, ImageTooLargeError, check_image, image_extension


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_whole_images_pass(kind: str, extension: str) -> None:
    data = encoded(kind=kind)
    assert image_extension(data) == extension
    check_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_off_images_are_refused(kind: str, share: float) -> None:
    data = encoded(kind=kind)
    with pytest.raises(ImageError):
        check_image(data[: int(len(data) * share)])


def test_a_jpeg_without_its_last_two_bytes_is_refused() -> None:
    with pytest.raises(ImageError):
        check_image(encoded()[:-2])


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    check_image(encoded() + b"appended by a camera")


def test_a_cmyk_jpeg_passes() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(stream, "JPEG")
    check_image(stream.getvalue())


@pytest.mark.parametrize(("width", "height"), [(19_000, 19_000), (5_001, 5_000), (16_385, 1)])
def test_too_many_pixels_are_refused_by_the_header_alone(width: int, height: int) -> None:
    # the data holds no such picture: decoding would say that it is damaged, not that it is too large
    with pytest.raises(ImageTooLargeError):
        check_image(png_bomb(width, height))


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"GIF89a" + bytes(20), b"\xff\xd8\xff", b"RIFF"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        check_image(data)
