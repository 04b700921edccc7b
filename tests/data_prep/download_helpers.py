"""Url lists for downloads, and what downloads left behind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.web.ledger import last_outcomes
from formats.tar import TarSamples


def write_urls(path: Path, urls: list[str], **columns: list[object]) -> Path:
    uids = [f"u{index}" for index in range(len(urls))]
    captions = [f"caption {index}" for index in range(len(urls))]
    pq.write_table(pa.table({"uid": uids, "url": urls, "caption": captions, **columns}), path)
    return path


def ledger(directory: Path) -> dict[str, dict]:
    """url -> row, for the last outcome of each."""
    rows = [row for table in last_outcomes(directory) for row in table.to_pylist()]
    assert len({row["url"] for row in rows}) == len(rows)
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["url"]: row for row in rows}


def samples(directory: Path) -> dict[str, tuple[Image.Image, str, dict]]:
    """uid -> (picture, caption, metadata) of every sample, each of which occurs once."""
    found = {}
    for path in sorted(directory.glob("*.tar")):
        for sample in TarSamples(path):
            metadata = json.loads(sample.members["json"])
            assert metadata["uid"] not in found
            found[metadata["uid"]] = (
                Image.open(io.BytesIO(sample.members["jpg"])),
                sample.members["txt"].decode(),
                metadata,
            )
    return found
