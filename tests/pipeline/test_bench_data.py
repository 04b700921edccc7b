"""bench-data: every part of the loader has a rate, and what binds is what was made slow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from formats.errors import UserError
from pipeline import bench_data

PARTS = ["read", "decode", "augment", "tokenise", "collate"]


def options(shards: Path, tokenizer_file: Path, tmp_path: Path) -> list[str]:
    overrides = [f"data.train={shards}", f"data.tokenizer={tokenizer_file}", f"data.cache_directory={tmp_path}"]
    return ["--recipe", "demo", *overrides, "data.workers=0", "train.micro_batch_size=8", "--seconds", "0.2"]


def test_a_table_and_a_verdict(
    shards: Path, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_data.main([*options(shards, tokenizer_file, tmp_path), "--samples-per-s", "1e9"]) == 0
    printed = capsys.readouterr().out
    for part in (*PARTS, "all"):
        assert f"\n{part} " in printed
    assert "96 samples in 3 shards" in printed
    assert "takes 1,000,000,000 samples/s: too slow" in printed


def test_what_binds_is_the_slowest_part(
    shards: Path,
    tokenizer_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collate = bench_data.collate
    monkeypatch.setattr(bench_data, "collate", lambda samples: (time.sleep(0.1), collate(samples))[1])
    monkeypatch.setattr(bench_data, "_measure_rate", lambda *_: 8 / 0.1)
    assert bench_data.main([*options(shards, tokenizer_file, tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["binds"] == "collate"
    assert list(report["us_per_sample"]) == PARTS
    assert 9_000 < report["us_per_sample"]["collate"] < 40_000
    assert report["samples_measured"] > 0


def test_captions_alone_are_read_and_masked(
    shards: Path, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["concepts.objective=mlm", "concepts.curriculum=none"]
    assert bench_data.main([*options(shards, tokenizer_file, tmp_path), *words, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["us_per_sample"]) == ["read", "tokenise", "collate"]


def test_mistakes_are_those_of_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard directory"):
        bench_data.main(["--recipe", "demo", f"data.train={tmp_path / 'none'}"])
