"""Every way in which a server can misbehave, against a real download: the outcome of each url is exact."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from download_helpers import ledger, samples, write_urls
from make_images import encoded, png_chunk
from PIL import Image
from small_dns import SERVER_FAILURE, SmallDns
from small_web import Page, SmallWeb, self_signed

from data_prep.shards.verify import verify
from data_prep.web.download import Settings, download, retry
from data_prep.web.ledger import count_outcomes
from data_prep.web.passes import Pass
from data_prep.web.shard_worker import ShardWorker
from data_prep.web.web_image import WebImage, to_jpeg
from formats.errors import UserError

SETTINGS = Settings(
    image_size=32, samples_per_shard=100, processes=1, threads=64, timeout_s=1.5, deadline_s=3.0, max_bytes=2_000_000,
    retries=1, host_connections=64, host_requests_per_s=1000, allow_local=True,
)  # fmt: skip
SECRET = b"52.5200 N 13.4050 E"


@pytest.fixture
def web() -> Iterator[SmallWeb]:
    with SmallWeb() as server:
        yield server


@pytest.fixture
def dns() -> Iterator[SmallDns]:
    with SmallDns() as server:
        yield server


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def black_png(side: int) -> bytes:
    """A valid PNG of side x side black pixels, a few KB."""
    rows = zlib.compress(bytes((side // 8 + 1 + 1) * side), 9)
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    parts = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def with_much_metadata(jpeg: bytes) -> bytes:
    """The same picture after 1 MB of EXIF and comments."""
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    payload = exif.tobytes()
    segment = b"\xff\xe1" + (2 + len(payload)).to_bytes(2, "big") + payload
    filler = b"\xff\xe1" + (65_535).to_bytes(2, "big") + b"Exif\x00\x00" + b"\x00" * 65_527
    return jpeg[:2] + segment + filler * 16 + jpeg[2:]


def drip() -> Iterator[bytes]:
    while True:
        yield b"\xff"
        time.sleep(0.3)


def flood() -> Iterator[bytes]:
    while True:
        yield b"\xff" * 65_536


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


PHOTO = encoded(1, size=64)
GREEN = Image.new("RGB", (20, 20), (0, 160, 0))
RETRY_SOON = Page(status=429, headers={"Retry-After": "1"})

# path -> (what it answers, the class of the outcome)
WEB: dict[str, tuple[Page | list[Page], str]] = {
    "/good.jpg": (Page(PHOTO), "ok"),
    "/absent": (Page(status=404), "4xx"),
    "/gone": (Page(status=410), "4xx"),
    "/busy": ([RETRY_SOON, Page(PHOTO)], "ok"),
    "/flaky": ([Page(status=500), Page(PHOTO)], "ok"),
    "/broken": (Page(status=503), "5xx"),
    "/circle": (Page(status=302, headers={"Location": "/circle"}), "other"),
    "/moved": (Page(status=301, headers={"Location": "/good.jpg"}), "ok"),
    "/to_metadata": (Page(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data"}), "refused"),
    "/to_intranet": (Page(status=302, headers={"Location": "http://10.0.0.1/"}), "refused"),
    "/to_file": (Page(status=302, headers={"Location": "file:///etc/hostname"}), "refused"),
    "/to_nowhere": (Page(status=302, headers={"Location": "http://[::bad/"}), "other"),
    "/no_location": (Page(status=302), "other"),
    "/drip": (Page(stream=drip), "timeout"),
    "/flood": (Page(stream=flood), "too-large"),
    "/announced": (Page(PHOTO, missing_bytes=10**9), "too-large"),
    "/cut": (Page(PHOTO[:100], missing_bytes=500), "connect"),
    "/short": (Page(PHOTO, missing_bytes=-200), "other"),
    "/silent": (Page(PHOTO, delay_s=6), "timeout"),
    "/html.jpg": (Page(b"<html>sorry</html>", headers={"Content-Type": "image/jpeg"}), "decode"),
    "/drawing.svg": (Page(b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>"), "decode"),
    "/empty.jpg": (Page(b""), "decode"),
    "/truncated.jpg": (Page(PHOTO[: len(PHOTO) // 2]), "decode"),
    "/zipped.jpg": (Page(zlib.compress(PHOTO), headers={"Content-Encoding": "deflate"}), "decode"),
    "/bomb.png": (Page(black_png(19_000)), "too-large"),
    "/strip.png": (Page(saved(Image.new("RGB", (900, 3)), "PNG")), "decode"),
    "/animated.gif": (Page(saved(GREEN, "GIF", save_all=True, append_images=[Image.new("RGB", (20, 20))])), "ok"),
    "/cmyk.jpg": (Page(saved(GREEN.convert("CMYK"), "JPEG")), "ok"),
    "/palette.png": (Page(saved(GREEN.quantize(4), "PNG")), "ok"),
    "/16bit.png": (Page(saved(Image.fromarray(np.full((20, 20), 160 * 257, np.uint16)), "PNG")), "ok"),
    "/see_through.png": (Page(saved(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG")), "ok"),
    "/metadata.jpg": (Page(with_much_metadata(PHOTO)), "ok"),
    "/secret/photo.jpg": (Page(PHOTO), "opt-out"),
    "/noai.jpg": (Page(PHOTO, headers={"X-Robots-Tag": "noarchive, noai"}), "opt-out"),
    "/noml.jpg": (Page(PHOTO, headers={"X-Robots-Tag": "cluster-clip-data-prep: noml"}), "opt-out"),
    "/others.jpg": (Page(PHOTO, headers={"X-Robots-Tag": "otherbot: noindex"}), "ok"),
    "/changed.jpg": (Page(PHOTO), "hash"),
    "/same.jpg": (Page(PHOTO), "ok"),
    "/a%2Fb%2Cc.jpg?signature=x%3D%3d": (Page(PHOTO), "ok"),
}


@pytest.mark.slow
def test_each_url_of_a_hostile_web_has_its_exact_outcome(tmp_path: Path, web: SmallWeb, dns: SmallDns) -> None:
    web.pages = {path: page for path, (page, _) in WEB.items()}
    web.pages["/robots.txt"] = Page(b"User-agent: *\nDisallow: /secret/\n")
    dns.names = {
        "photos.example": ["127.0.0.1"],
        "rebound.example": ["169.254.169.254"],
        "ill.example": SERVER_FAILURE,
        "mute.example": None,
    }
    expected = {web.url(path): outcome for path, (_, outcome) in WEB.items()}
    expected |= {
        web.url("/good.jpg", "photos.example"): "ok",
        web.url("/same.jpg", "rebound.example"): "refused",
        "http://no-such-name.example/1.jpg": "dns",
        "http://ill.example/1.jpg": "dns",
        "http://mute.example/1.jpg": "dns",
        "http://169.254.169.254/latest/meta-data": "refused",
        f"http://user:word@127.0.0.1:{web.port}/good.jpg": "refused",
        f"http://127.0.0.3:{closed_port()}/1.jpg": "connect",
    }
    hashes = {web.url("/changed.jpg"): "0" * 64, web.url("/same.jpg"): hashlib.sha256(PHOTO).hexdigest()}
    urls = write_urls(
        tmp_path / "urls.parquet",
        list(expected),
        sha256=[hashes.get(url) for url in expected],
        similarity=[0.25 for _ in expected],
    )
    settings = dataclasses.replace(SETTINGS, nameservers=(dns.address,))
    download(urls, tmp_path / "shards", settings)

    rows = ledger(tmp_path / "shards")
    # bytes beyond the announced length are an error if they come with the rest, else the picture is cut short
    short = web.url("/short")
    assert rows[short]["class"] in ("other", "decode")
    expected[short] = rows[short]["class"]
    assert {
        url: (row["class"], row["error_message"]) for url, row in rows.items() if row["class"] != expected[url]
    } == {}
    assert set(rows) == set(expected)
    assert rows[web.url("/busy")]["tries"] == rows[web.url("/flaky")]["tries"] == 2
    assert rows[web.url("/broken")]["http_status"] == 503
    assert rows[web.url("/gone")]["tries"] == 1
    assert web.requests["/gone"] == 1
    assert web.requests["/broken"] == 2
    assert "/secret/photo.jpg" not in web.requests
    assert web.requests["/robots.txt"] == 2  # of the address, and of the name
    assert web.requests["/circle"] == 6
    assert rows[web.url("/drip")]["elapsed_s"] == pytest.approx(3.0, abs=0.5)
    assert web.headers["/good.jpg"]["User-Agent"].startswith("cluster-clip-data-prep/")

    found = samples(tmp_path / "shards")
    assert set(found) == {row["uid"] for row in rows.values() if row["class"] == "ok"}
    check_pictures({url: found[row["uid"]][0] for url, row in rows.items() if row["class"] == "ok"}, web)
    _, caption, metadata = found[rows[web.url("/good.jpg")]["uid"]]
    assert caption == "caption 0"
    assert metadata["sha256"] == hashlib.sha256(PHOTO).hexdigest()
    assert metadata["similarity"] == 0.25
    assert (metadata["original_width"], metadata["width"]) == (64, 32)
    for path in (tmp_path / "shards").glob("*.tar"):
        assert SECRET not in path.read_bytes()
    assert verify(tmp_path / "shards", processes=1, max_bad_ratio=0.0)


def check_pictures(pictures: dict[str, Image.Image], web: SmallWeb) -> None:
    def colour(path: str) -> list[int]:
        return np.asarray(pictures[web.url(path)].convert("RGB")).reshape(-1, 3).mean(0).round().astype(int).tolist()

    assert colour("/animated.gif") == pytest.approx([0, 160, 0], abs=3)
    assert colour("/palette.png") == pytest.approx([0, 160, 0], abs=3)
    assert colour("/cmyk.jpg") == pytest.approx([0, 160, 0], abs=3)
    assert colour("/16bit.png") == pytest.approx([160, 160, 160], abs=2)
    assert colour("/see_through.png") == [255, 255, 255]
    assert pictures[web.url("/metadata.jpg")].size == (32, 32)


@pytest.mark.slow
def test_retry_fetches_the_failed_urls_only_and_into_further_shards(tmp_path: Path, web: SmallWeb) -> None:
    web.pages = {f"/{index}.jpg": Page(encoded(index)) for index in range(5)}
    web.pages |= {
        "/late.jpg": Page(status=503),
        "/later.jpg": Page(status=503),
        "/flaky.jpg": Page(PHOTO[:99], 200, {}, 9),
    }
    urls = [web.url(path) for path in web.pages] + [web.url("/absent.jpg")]
    settings = dataclasses.replace(SETTINGS, samples_per_shard=4, retries=0)
    shards = tmp_path / "shards"
    download(write_urls(tmp_path / "urls.parquet", urls), shards, settings)
    assert count_outcomes(shards) == {"ok": 5, "5xx": 2, "connect": 1, "4xx": 1}
    assert verify(shards, processes=1, max_bad_ratio=0.0)
    (tmp_path / "urls.parquet").rename(tmp_path / "moved.parquet")  # the ledger is enough
    asked = web.requests.copy()

    web.pages["/late.jpg"] = Page(PHOTO)
    assert retry(shards, ["5xx", "timeout"], settings) == {"ok": 6, "5xx": 1, "connect": 1, "4xx": 1}
    assert web.requests - asked == {"/late.jpg": 1, "/later.jpg": 1, "/robots.txt": 1}
    assert not (shards / "manifest.jsonl").exists()

    web.pages["/later.jpg"] = web.pages["/flaky.jpg"] = Page(PHOTO)
    assert retry(shards, ["5xx", "connect"], settings) == {"ok": 8, "4xx": 1}
    rows = ledger(shards)
    assert {row["attempt"] for row in rows.values()} == {1, 2, 3}
    assert rows[web.url("/later.jpg")]["attempt"] == 3
    assert [path.name for path in sorted(shards.glob("*.tar"))] == [f"0000{n}.tar" for n in range(5)]
    captions = {uid: caption for uid, (_, caption, _) in samples(shards).items()}
    assert captions == {f"u{n}": f"caption {n}" for n in range(8)}
    assert verify(shards, processes=1, max_bad_ratio=0.0)

    assert retry(shards, ["5xx"], settings) == {"ok": 8, "4xx": 1}  # nothing left: nothing done
    assert (shards / "manifest.jsonl").exists()
    with pytest.raises(UserError, match=r"no such class.*did you mean '5xx'"):
        retry(shards, ["5x"], settings)
    with pytest.raises(UserError, match="no download was made here"):
        retry(tmp_path, ["5xx"], settings)


@pytest.mark.slow
def test_a_certificate_that_nobody_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path / "certificate.pem")
    if certificate is None:
        pytest.skip("no openssl command")
    with SmallWeb(certificate=certificate) as web:
        web.pages = {"/photo.jpg": Page(PHOTO)}
        urls = write_urls(tmp_path / "urls.parquet", [web.url("/photo.jpg")])
        with pytest.raises(UserError, match="none of 1 urls"):
            download(urls, tmp_path / "refused", SETTINGS)
        assert count_outcomes(tmp_path / "refused") == {"tls": 1}
        assert not web.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # now the system vouches for it
        assert download(urls, tmp_path / "trusted", SETTINGS) == {"ok": 1}


def test_a_picture_that_breaks_the_decoder_costs_no_more_than_itself(
    tmp_path: Path, web: SmallWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(data: bytes, *arguments: object) -> WebImage:
        if data != PHOTO:
            raise MemoryError("too much")
        return to_jpeg(data, 32, "no")

    monkeypatch.setattr("data_prep.web.shard_worker.to_jpeg", fragile)
    web.pages = {"/evil.jpg": Page(encoded(5)), "/good.jpg": Page(PHOTO)}
    urls = write_urls(tmp_path / "urls.parquet", [web.url(path) for path in web.pages])
    one = Pass(attempt=1, urls=urls, rows=2, classes=(), first_shard=0, samples_per_shard=2)
    assert ShardWorker(tmp_path, one, SETTINGS)((0, (0, 2))) == (True, (0, (0, 2)))
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert [(row["class"], row["error_message"]) for row in rows] == [("other", "MemoryError: too much"), ("ok", None)]
