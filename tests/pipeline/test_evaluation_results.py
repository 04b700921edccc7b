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


def test_two_runs_that_are_called_alike_are_two_results(tmp_path: Path) -> None:
    """As `runs/a` seen from two folders, and as names that differ where file names cannot."""
    a = replace(result_of("x", 0.1, "seed0"), weights_sha256="aa" * 32)
    b = replace(result_of("x", 0.2, "seed0"), weights_sha256="bb" * 32)
    others = [result_of("x", 0.3, "sweep/a"), result_of("x", 0.4, "sweep_a"), result_of("y" + "z" * 300, 0.5)]
    others.append(result_of("x" + "z" * 300, 0.6))
    write_results(tmp_path, [a, b, *others])
    write_results(tmp_path, [a])
    assert sorted(result.metrics["acc1"] for result in read_results(tmp_path / "results.jsonl")) == [
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
    ]
    contents = [json.loads(file.read_text()) for file in (tmp_path / "clip_benchmark").iterdir()]
    assert sorted(content["metrics"]["acc1"] for content in contents) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_the_older_name_of_a_clip_benchmark_file_gives_way(tmp_path: Path) -> None:
    older = tmp_path / "clip_benchmark" / "x_a_m_en_zeroshot_classification.json"
    older.parent.mkdir()
    older.write_text("{}")
    (older.parent / "mine.json").write_text("{}")
    write_results(tmp_path, [result_of("x", 0.1)])
    names = sorted(file.name for file in older.parent.iterdir())
    assert names[0] == "mine.json"
    assert names[1].startswith("x_a_m_en_zeroshot_classification-")
    assert len(names) == 2


@pytest.mark.parametrize(
    "line",
    ["[]", "5", '{"model": "m"}', "{", '"\\ud800"', '{"metrics": null}', "\x00"]
    + [
        json.dumps(json.loads(result_of("x", 0.5).to_json()) | change)
        for change in (
            {"metrics": {"x": "high"}},
            {"model": 3},
            {"samples": "ten"},
            {"metrics": {"x": float("nan")}},
        )
    ],
)
def test_a_line_that_is_no_result_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(f"{result_of('y', 0.5).to_json()}\n{line}\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 2 is not a result: ") as failure:
        write_results(tmp_path, [result_of("x", 0.1)])
    assert "\n" not in str(failure.value)
    assert line in (tmp_path / "results.jsonl").read_text()
