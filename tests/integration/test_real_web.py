"""Real pictures and captions, served as the web serves them: ingest -> download -> verify, outcome by outcome."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_web import Page, SmallWeb

from data_prep.lists.ingest import ingest
from data_prep.shards.verify import verify
from data_prep.web.download import Settings, download, retry
from data_prep.web.download_report import write_report
from data_prep.web.ledger import last_outcomes
from formats.tar import TarSamples

DATA = Path(os.environ.get("CLUSTER_CLIP_DATA", Path(__file__).parents[3] / "shared" / "data"))
ORIGINALS = DATA / "flickr8k_originals_300.parquet"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ORIGINALS.exists(), reason="set CLUSTER_CLIP_DATA to a folder with Flickr8k parquet files"),
]


@pytest.fixture(scope="module")
def web() -> Iterator[SmallWeb]:
    with SmallWeb() as server:
        yield server


def flood() -> Iterator[bytes]:
    while True:
        yield bytes(1 << 16)


def troubled(number: int, path: str, image: bytes, web: SmallWeb) -> str:
    """Put a picture on the web with the trouble that its number brings; returns its outcome."""
    trouble, page = number % 20, Page(image)
    moved = Page(status=302, headers={"Location": f"/moved{path}"})
    troubles: dict[int, tuple[Page | list[Page], str]] = {
        1: (Page(status=404), "4xx"),
        2: (moved, "ok"),
        3: (Page(b"<html><body>not here</body></html>", headers={"Content-Type": "image/jpeg"}), "decode"),
        4: (Page(image[: len(image) * 2 // 3]), "decode"),
        5: (Page(image[:1000], missing_bytes=len(image) - 1000), "connect"),
        6: (Page(image, headers={"X-Robots-Tag": "noai"}), "opt-out"),
        7: (Page(status=503), "5xx"),
        8: ([Page(status=500), page], "ok"),
        9: (Page(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data/"}), "refused"),
        10: (Page(image, missing_bytes=10**9), "too-large"),
        11: (Page(stream=flood), "too-large"),
        12: (page, "hash"),
    }
    answer, outcome = troubles.get(trouble, (page, "ok"))
    if number % 50 == 33:
        answer, outcome = Page(image, delay_s=6), "timeout"
    if path.startswith("/private"):
        outcome = "opt-out"
    web.pages[path], web.pages[f"/moved{path}"] = answer, page
    return outcome


def test_every_picture_of_a_troubled_web_has_its_exact_outcome(tmp_path: Path, web: SmallWeb) -> None:
    rows = pq.read_table(ORIGINALS).to_pylist()
    web.pages["/robots.txt"] = Page(b"User-agent: *\nDisallow: /private/\n")
    expected, hashes, lines = {}, {}, []
    for number, row in enumerate(rows):
        path = f"/{'private' if number % 50 == 34 else 'public'}/{row['filename']}"
        url = web.url(path)
        expected[url] = troubled(number, path, row["image"], web)
        hashes[url] = hashlib.sha256(row["image"]).hexdigest()
        listed = {"hash": "0" * 64, "decode": None}.get(expected[url], hashes[url])
        lines.append({"url": url, "caption": row["captions"][0], "sha256": listed})
    lines += [{"url": "file:///etc/hostname", "caption": "a local file", "sha256": None}]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "list.parquet")

    urls = tmp_path / "urls.parquet"
    tally = ingest([str(tmp_path / "list.parquet")], str(urls))
    assert +tally.dropped == Counter({"url not http(s)": 1})
    assert tally.written == len(rows)

    shards = tmp_path / "shards"
    settings = Settings(
        samples_per_shard=150, processes=2, threads=64, retries=1, deadline_s=3, host_connections=128, max_bytes=2**22,
        host_requests_per_s=1000, allow_local=True,
    )  # fmt: skip
    outcomes = download(urls, shards, settings)
    ledger = {row["url"]: row for table in last_outcomes(shards) for row in table.to_pylist()}
    assert {url: row["class"] for url, row in ledger.items()} == expected
    assert outcomes == Counter(expected.values())
    assert len(outcomes) == 10
    stored = {url: row["sha256"] for url, row in ledger.items() if row["class"] == "ok"}
    assert stored == {url: hashes[url] for url in stored}

    # the servers recover: what failed for a moment is fetched into a shard of its own
    for path in list(web.pages):
        if expected.get(web.url(path)) in ("5xx", "timeout"):
            web.pages[path] = web.pages[f"/moved{path}"]
    recovered = outcomes["5xx"] + outcomes["timeout"]
    outcomes = retry(shards, ["5xx", "timeout"], settings)
    assert outcomes["ok"] == len(stored) + recovered

    assert verify(shards, processes=2, max_bad_ratio=0.0)
    dataset = json.loads((shards / "dataset.json").read_text())
    assert dataset["samples"] == outcomes["ok"]
    assert dataset["skipped"] == {}
    captions = {row["captions"][0] for row in rows}
    for path in sorted(shards.glob("*.tar")):
        for sample in TarSamples(path):
            assert sample.members["txt"].decode() in captions
            metadata = json.loads(sample.members["json"])
            # scaled down to 256 pixels, never up
            original = min(metadata["original_width"], metadata["original_height"])
            assert min(metadata["width"], metadata["height"]) == min(256, original)

    write_report(shards, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"{outcomes['ok'] / len(rows):.1%} in shards" in page
    assert "retry of 5xx, timeout" in page
    assert "http://" not in re.sub(r"data:image/svg\+xml;base64,[^\"]*", "", page)
