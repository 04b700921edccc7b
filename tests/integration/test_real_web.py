"""Real pictures and captions, served as the web serves them: ingest -> download -> verify, outcome by outcome."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_web import Page, SmallWeb

from data_prep.download import Settings, download
from data_prep.ingest import ingest
from data_prep.tar_reader import TarSamples
from data_prep.verify import verify

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


def test_every_picture_of_a_troubled_web_has_its_exact_outcome(tmp_path: Path, web: SmallWeb) -> None:
    rows = pq.read_table(ORIGINALS).to_pylist()
    expected: Counter[str] = Counter()
    lines = []
    for index, row in enumerate(rows):
        path, image = f"/{row['filename']}", row["image"]
        trouble = index % 10
        if trouble == 1 and index < 200:  # 20 gone
            expected["http 4xx"] += 1
        elif trouble == 2 and index < 100:  # 10 moved: they are found all the same
            web.pages[path] = Page(status=302, headers={"Location": f"/moved{path}"})
            web.pages[f"/moved{path}"] = Page(image)
            expected["ok"] += 1
        elif trouble == 3 and index < 80:  # 8 sites that answer with a page in place of the picture
            web.pages[path] = Page(b"<html><body>not here</body></html>", headers={"Content-Type": "image/jpeg"})
            expected["decode/resize"] += 1
        elif trouble == 4 and index < 60:  # 6 pictures that are cut off on the server's own disk
            web.pages[path] = Page(image[: len(image) * 2 // 3])
            expected["decode/resize"] += 1
        elif trouble == 5 and index < 50:  # 5 connections that break
            web.pages[path] = Page(image[:1000], missing_bytes=len(image) - 1000)
            expected["connect"] += 1
        elif trouble == 6 and index < 40:  # 4 that opt out
            web.pages[path] = Page(image, headers={"X-Robots-Tag": "noai"})
            expected["opt-out"] += 1
        elif trouble == 7 and index < 30:  # 3 broken servers
            web.pages[path] = Page(status=503)
            expected["http 5xx"] += 1
        else:
            web.pages[path] = Page(image)
            expected["ok"] += 1
        lines.append(f"{row['captions'][0]}\t{web.url(path)}\n")
    lines += ["no url here\n", "a local file\tfile:///etc/hostname\n"]
    tsv = tmp_path / "Train-GCC-training.tsv"
    tsv.write_text("".join(lines), encoding="utf-8")

    urls = tmp_path / "urls.parquet"
    tally = ingest([str(tsv)], str(urls))
    assert +tally.dropped == Counter({"malformed line": 1, "url not http(s)": 1})
    assert tally.written == len(rows)

    shards = tmp_path / "shards"
    outcomes = download(urls, shards, Settings(samples_per_shard=100, processes=2, threads=16, retries=0))
    assert outcomes == expected

    assert verify(shards, processes=2, max_bad_ratio=0.0)
    dataset = json.loads((shards / "dataset.json").read_text())
    assert dataset["samples"] == expected["ok"]
    assert dataset["skipped"] == {}
    captions = {row["captions"][0] for row in rows}
    for path in sorted(shards.glob("*.tar")):
        for sample in TarSamples(path):
            assert sample.members["txt"].decode() in captions
            metadata = json.loads(sample.members["json"])
            # scaled down to 256 pixels, never up
            original = min(metadata["original_width"], metadata["original_height"])
            assert min(metadata["width"], metadata["height"]) == min(256, original)
