"""Every kind of picture, tar oddity and caption through every reader: all of them find the same."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tar
from make_images import png_chunk
from PIL import Image, ImageOps, PngImagePlugin
from shard_reading import loader_index

from data_prep.near import perceptual_hash
from data_prep.shards.verify import inspect_shard, verify
from data_prep.web.web_image import to_jpeg
from formats.manifest import read_manifest, usable_samples
from formats.pictures import check_picture, decode_picture, read_header, why_unusual
from formats.tar import TarSamples, index_samples
from formats.texts import TextError, clean, decode_text, is_blank
from pipeline.data.image_transform import decode_image


def scene(width: int = 48, height: int = 32) -> np.ndarray:
    """Smooth, and different in every corner and direction: uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(scene()), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def png_of_16_bits(colour_type: int, samples_HWC: np.ndarray, *chunks: bytes) -> bytes:
    """By hand: Pillow writes 16 bits of grey alone."""
    height, width = samples_HWC.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    end = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + end


def with_alpha() -> Image.Image:
    image = Image.fromarray(scene()).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def kinds() -> dict[str, bytes]:
    rgb, grey = Image.fromarray(scene()), Image.fromarray(scene()).convert("L")
    levels_HW1 = (scene()[..., :1].astype(np.uint16) << 8) + 77
    levels_HW1[:4] = 300
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "x" * 1_300_000, zip=True)
    palette = rgb.quantize(16)
    palette.info["transparency"] = 3
    found = {
        "rgb.jpg": saved(rgb, "JPEG", quality=95),
        "grey.jpg": saved(grey, "JPEG", quality=95),
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG", quality=95),
        "profile and xmp.jpg": saved(rgb, "JPEG", quality=95, icc_profile=bytes(400_000), xmp=b"<x/>" * 9000),
        "two pictures.jpg": saved(rgb, "MPO", quality=95, save_all=True, append_images=[grey.convert("RGB")]),
        "rgb.png": saved(rgb, "PNG"),
        "grey.png": saved(grey, "PNG"),
        "two colours.png": saved(grey.convert("1"), "PNG"),
        "palette.png": saved(rgb.quantize(16), "PNG"),
        "palette with a transparent colour.png": saved(palette, "PNG", transparency=3),
        "rgb with a transparent colour.png": saved(rgb, "PNG", transparency=tuple(scene()[5, 5].tolist())),
        "alpha.png": saved(with_alpha(), "PNG"),
        "grey with alpha.png": saved(with_alpha().convert("LA"), "PNG"),
        "16 bits of grey.png": png_of_16_bits(0, levels_HW1),
        "16 bits of grey, one level transparent.png": png_of_16_bits(
            0, levels_HW1, png_chunk(b"tRNS", struct.pack(">H", 300))
        ),
        "16 bits of colour.png": png_of_16_bits(2, (scene().astype(np.uint16) << 8) + 77),
        "a megabyte of xmp.png": saved(rgb, "PNG", pnginfo=text),
        "a megabyte of profile.png": saved(rgb, "PNG", icc_profile=np.random.default_rng(0).bytes(1_300_000)),
        "animated.png": saved(rgb, "PNG", save_all=True, append_images=[grey.convert("RGB")]),
        "lossless.webp": saved(rgb, "WEBP", lossless=True),
        "alpha.webp": saved(with_alpha(), "WEBP", lossless=True, exact=True),
        "animated.webp": saved(rgb, "WEBP", lossless=True, save_all=True, append_images=[grey.convert("RGB")]),
        "profile and xmp.webp": saved(rgb, "WEBP", lossless=True, icc_profile=bytes(2_000_000), xmp=b"<x/>" * 400_000),
    }
    for orientation in range(1, 9):
        found |= {f"turned {orientation}.{kind}": turned(kind.upper(), orientation) for kind in ("jpeg", "png")}
    return found | {"turned 6.webp": turned("WEBP", 6)}


def by_pillow(data: bytes) -> np.ndarray:
    """What a person sees on white, slowly: float [H, W, 3]. Limits on metadata are off."""
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits
    if image.mode.startswith("I"):
        levels_HW = np.asarray(image).astype(int)
        grey_HW = np.where(levels_HW == image.info.get("transparency"), 255, levels_HW // 256)
        return np.repeat(grey_HW[..., None], 3, -1).astype(float)
    rgba_HW4 = np.asarray(ImageOps.exif_transpose(image).convert("RGBA")).astype(float)
    if not image.has_transparency_data:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(float)
    share_HW1 = rgba_HW4[..., 3:] / 255
    return np.asarray(rgba_HW4[..., :3] * share_HW1 + 255 * (1 - share_HW1))


@pytest.mark.parametrize("name", sorted(kinds()))
def test_a_picture_is_the_same_to_every_reader(name: str) -> None:
    data = kinds()[name]
    expected_HWC = by_pillow(data)
    check_picture(data)
    pixels_HWC = decode_picture(data)
    # lossless kinds to the rounding of transparency, JPEGs to how chroma is brought to full size
    assert np.abs(pixels_HWC - expected_HWC).max() <= (4 if read_header(data).format == "jpg" else 1)
    of_loader_HWC = decode_image(data).permute(1, 2, 0).numpy()
    assert (of_loader_HWC == pixels_HWC).all()
    stored = to_jpeg(data, 256, "keep_ratio")
    assert (stored.height, stored.width) == pixels_HWC.shape[:2]
    assert np.abs(decode_picture(stored.data) - expected_HWC).mean() < 6
    small_SS = np.asarray(Image.fromarray(pixels_HWC).convert("L").resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(perceptual_hash.shrink(data).astype(int) - small_SS).max() < 12
    assert why_unusual(stored.data) is None


def test_what_other_readers_may_see_otherwise_is_named() -> None:
    unusual = {name: why for name, data in kinds().items() if (why := why_unusual(data)) is not None}
    plain = (
        "rgb.",
        "grey.",
        "two ",
        "palette.png",
        "16 bits of colour",
        "a megabyte",
        "profile",
        "lossless",
        "turned 1",
    )
    assert {name for name in kinds() if name not in unusual} == {
        name for name in kinds() if name.startswith(plain) or name == "animated.png"
    }
    assert unusual["turned 6.jpeg"] == "turned by EXIF"
    assert unusual["alpha.webp"] == unusual["palette with a transparent colour.png"] == "transparent"
    assert unusual["16 bits of grey.png"] == "16 bits"
    assert unusual["cmyk.jpg"] == "CMYK"


PICTURE = saved(Image.fromarray(scene()), "JPEG")
LATIN = "caf\udce9"  # the byte E9, as Python names it


def pair(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", PICTURE), (f"{key}.txt", b"a caption")]


ODD_TARS = {
    "a Mac's shadows between members": (
        [m for member in pair("./0") + pair("./1") for m in (("./._" + member[0][2:], b"\0\5\x16\7"), member)],
        ["./0", "./1"],
    ),
    "files without a type": ([("README", b"x"), pair("a")[0], ("LICENSE", b"y"), pair("a")[1]], ["a"]),
    "hidden folders": ([("x/.DS_Store", b"x"), *pair("x/a"), (".git.txt", b"x")], ["x/a"]),
    "unknown members of a sample": ([pair("a")[0], ("a.cls", b"1"), pair("a")[1], ("a.npy", b"")], ["a"]),
    "a dotted name": ([("a.b.jpg", PICTURE), *pair("c")], ["c"]),
    "upper case": ([("a.JPG", PICTURE), ("a.TXT", b"x")], ["a"]),
    "two names that differ in bytes that are not UTF-8": ([*pair(LATIN), *pair("caf\udce8")], ["caf\\xe9", "caf\\xe8"]),
    "long names": (pair("d" * 90 + "/" + "k" * 120), ["d" * 90 + "/" + "k" * 120]),
}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ODD_TARS)
def test_samples_of_a_tar_are_the_same_to_every_reader(name: str, tar_format: int, tmp_path: Path) -> None:
    members, keys = ODD_TARS[name]
    if tar_format == tarfile.USTAR_FORMAT and name == "long names":
        pytest.skip("ustar cannot hold them")
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w", format=tar_format, encoding="utf-8", errors="surrogateescape") as tar:
        for member, content in members:
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    assert index_samples(path, skip=()).keys == keys
    assert [sample.key for sample in TarSamples(path) if {"jpg", "txt"} <= sample.members.keys()] == keys
    assert verify(tmp_path, 1, max_bad_ratio=0.5)
    (shard,) = read_manifest(tmp_path).shards
    assert [sample.key for sample in usable_samples(tmp_path, shard)] == keys
    assert loader_index(shard).keys == keys


@pytest.mark.parametrize(
    ("change", "damage"),
    [
        (lambda data: gzip.compress(data), "gzip"),
        (lambda data: data + data, "joined"),
        (lambda data: b"<!DOCTYPE html><html>" * 40, "not a tar"),
        (lambda data: b"", "empty"),
        (lambda data: data[:700], "cut off inside a member"),
        (lambda data: data[:1024], "no end-of-archive mark"),
    ],
    ids=["gzip", "joined", "html", "empty", "cut in a member", "cut between members"],
)
def test_what_is_no_single_whole_tar_is_named(change: object, damage: str, tmp_path: Path, capsys: object) -> None:
    path = write_tar_of(tmp_path, [("a.jpg", b"x" * 300), ("a.txt", b"x")])
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    assert damage in inspect_shard(path).damage
    assert not verify(tmp_path, 1, max_bad_ratio=1)
    assert damage in capsys.readouterr().out  # type: ignore[attr-defined]


def write_tar_of(directory: Path, members: list[tuple[str, bytes]]) -> Path:
    write_tar(directory / "00000.tar", members)
    return directory / "00000.tar"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a caption\n", "a caption"),
        ("\ufeffcaf\u00e9".encode(), "café"),
        (b"\xef\xbb\xbf", ""),
        ("\u200b\u2060 \u00ad\ufe0f".encode(), ""),
        (b"\0\0", ""),
        (b" \t\r\n", ""),
        ("\u3164\u2800".encode(), ""),
        ("\U0001f469\u200d\U0001f680".encode(), "\U0001f469\u200d\U0001f680"),
        (b"padded\0\0\0", "padded"),
        (b"caf\xe9", None),
        ("utf-16".encode("utf-16"), None),
        ("utf-16 without a mark".encode("utf-16-le"), None),
        (b"\xed\xa0\x80", None),
    ],
)
def test_captions_are_text_nothing_or_refused(data: bytes, text: str | None, tmp_path: Path) -> None:
    if text is None:
        with pytest.raises(TextError, match=r"UTF-8"):
            decode_text(data)
    else:
        assert decode_text(data) == text
        assert is_blank(data.decode("utf-8")) == (text == "")
    reason = "caption_not_utf8" if text is None else "empty_caption"
    line = inspect_shard(write_tar_of(tmp_path, [("a.jpg", PICTURE), ("a.txt", data)]))
    assert dict(line.skipped) == ({} if text else {reason: ["a"]})


def test_text_from_outside_can_be_written_anywhere() -> None:
    assert clean("gone\udce9\0 away \ud83d") == "gone\ufffd away \ufffd"
    assert clean("caf\u00e9 \U0001f680") == "café \U0001f680"
