"""The page of `data-prep report`, from a ledger written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.__main__ import main
from data_prep.web.ledger import write_ledger
from data_prep.web.web_image import RESIZE_MODES

LISTED = pa.schema({"uid": pa.string(), "url": pa.string(), "caption": pa.string()})


def write_download(directory: Path, outcomes: list[tuple[str, str, str | None]], mode: str = "keep_ratio") -> None:
    """What a download of one shard leaves, without the pictures; outcomes are (url, class, message)."""
    rows = [
        {"uid": url, "url": url, "caption": "x", "class": outcome, "error_message": message, "elapsed_s": 0.1}
        for url, outcome, message in outcomes
    ]
    write_ledger(directory / "00000.parquet", pa.Table.from_pylist(rows, LISTED), rows)
    counts: dict[str, int] = {}
    for _, outcome, _ in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    statistics = {
        "outcomes": counts,
        "successes": counts.get("ok", 0),
        "count": len(rows),
        "start_time": 0,
        "end_time": 9,
    }
    (directory / "00000_stats.json").write_text(json.dumps(statistics))
    step = {"step": "download", "urls": "urls.parquet", "rows": len(rows), "samples_per_shard": 100}
    settings = {"resize_mode": mode, "image_size": 256, "blur_column": None, "accept_changed": False}
    (directory / "provenance.jsonl").write_text(json.dumps(step | settings) + "\n")


def test_the_page_counts_outcomes_and_names_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_download(
        tmp_path,
        [
            ("http://a.example/1.jpg", "ok", None),
            ("http://<b>.example/1.jpg", "4xx", "HTTP 404 <script>"),
            ("http://c.example/1.jpg", "hash", f"sha256 {'1' * 64}"),
            ("http://c.example/2.jpg", "hash", f"sha256 {'2' * 64}"),
            ("http://[bad/1.jpg", "refused", "not a url"),
        ],
    )
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'download.html'}\n"
    page = (tmp_path / "download.html").read_text()
    assert "5 urls of urls.parquet, 20.0% in shards" in page
    rows = re.findall(r"<tr[^>]*><th>(.*?)</th><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>", page)
    assert ("hash", "2", "40.0%") in rows
    assert ("c.example", "hash", "2") in rows
    assert ("no valid url", "refused", "1") in rows
    assert "sha256 …" in page  # once, not for each hash
    assert "<script>" not in page
    assert "<b>" not in page
    assert "http://" not in page  # no link to anywhere


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_the_size_is_said_in_words_and_charts_are_for_both_kinds_of_page(tmp_path: Path, mode: str) -> None:
    write_download(tmp_path, [("http://a.example/1.jpg", "ok", None)], mode)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "download.html").read_text()
    assert ("256 pixels" in page) == (mode != "no")
    assert f"by {mode}" not in page
    charts = re.findall(r'<source media="\(prefers-color-scheme: dark\)" srcset="(.*?)">\s*<img src="(.*?)"', page)
    assert len(charts) == 4
    assert all(dark != light for dark, light in charts)


def test_a_directory_without_a_download_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no download was made here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("00000.parquet", "is damaged: delete 00000_stats.json"),
        ("provenance.jsonl", "has a download without urls, rows"),
    ],
)
@pytest.mark.parametrize("command", ["report", "retry"])
def test_damage_is_one_line(
    tmp_path: Path, name: str, message: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_download(tmp_path, [("http://a.example/1.jpg", "5xx", "HTTP 500")])
    (tmp_path / name).write_text('{"step": "download"}')
    assert main([command, str(tmp_path)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
