"""results.jsonl: results replace their own kind only, and the table of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from formats.errors import UserError
from pipeline.evaluation.results import Result, format_table, read_results, write_results


def result_of(dataset: str, acc1: float, checkpoint: str = "a") -> Result:
    return Result("m", checkpoint, dataset, "zeroshot_classification", {"acc1": acc1}, samples=10)


def test_results_replace_their_own_key_only(tmp_path: Path) -> None:
    write_results(tmp_path, [result_of("x", 0.1), result_of("y", 0.2)])
    file = write_results(tmp_path, [result_of("x", 0.3), result_of("x", 0.4, checkpoint="b")])
    assert [(r.dataset, r.checkpoint, r.metrics["acc1"]) for r in read_results(file)] == [
        ("x", "a", 0.3),
        ("y", "a", 0.2),
        ("x", "b", 0.4),
    ]


def test_results_file_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 1 is not a result"):
        write_results(tmp_path, [result_of("x", 0.1)])
    assert (tmp_path / "results.jsonl").read_text() == "precious\n"


def test_unknown_fields_of_a_result_are_ignored(tmp_path: Path) -> None:
    line = json.loads(result_of("x", 0.5).to_json()) | {"pretrained": "laion", "language": "en"}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n\n")
    assert read_results(tmp_path / "results.jsonl") == [result_of("x", 0.5)]


def test_table_shows_chance_beside_each_figure() -> None:
    result = replace(result_of("shapes", 0.4321), chance={"acc1": 0.05})
    assert "shapes   acc1    43.21    5.00       10" in format_table([result])
