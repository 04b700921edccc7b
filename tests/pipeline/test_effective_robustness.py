"""Effective robustness against a line that is known, and as a table of results."""

from __future__ import annotations

import math

import pytest
from report_material import checkpoints_of, result_of

from pipeline.reporting.tables.paper_tables import effective_robustness, effective_robustness_table
from pipeline.reporting.tables.papers import read_published
from pipeline.reporting.tables.rows import by_recipe


def expected_at(share: float) -> float:
    """A line in logits: slope 0.8, intercept -0.5."""
    return 1 / (1 + math.exp(-(0.8 * math.log(share / (1 - share)) - 0.5)))


def test_models_on_the_line_have_none_and_others_their_distance() -> None:
    baseline = [(share, expected_at(share)) for share in (0.3, 0.45, 0.6, 0.75)]
    assert effective_robustness(0.5, expected_at(0.5), baseline) == pytest.approx(0)
    assert effective_robustness(0.9, expected_at(0.9) + 0.07, baseline) == pytest.approx(0.07)


def test_table_has_what_results_allow() -> None:
    figures = {"imagenet1k": 0.36, "wds_imagenet-a": 0.2, "imagenet_sketch": 0.1, "cifar10": 0.5}
    results = [result_of("robust", name, {"acc1": share}) for name, share in figures.items()]
    results.append(result_of("other", "imagenetv2", {"acc1": 0.3}))  # without ImageNet itself there is no expectation
    table = effective_robustness_table(by_recipe(checkpoints_of(results)), read_published())
    assert table is not None
    (row,) = table.rows
    cells = dict(zip((column.label for column in table.columns), row.cells, strict=True))
    assert (cells["IN-V2"].text, cells["IN-R"].text) == ("", "")
    # around 36 % on ImageNet the published rows have about 8 % on A and 25 % on Sketch
    assert cells["IN-A"].value == pytest.approx(12, abs=1)
    assert cells["Sketch"].value == pytest.approx(-14.5, abs=1.5)
    assert cells["IN-A"].text.startswith("+1")


def test_no_table_without_imagenet_or_without_a_baseline() -> None:
    results = [result_of("x", "imagenet-a", {"acc1": 0.1})]
    assert effective_robustness_table(by_recipe(checkpoints_of(results)), read_published()) is None
    results.append(result_of("x", "imagenet1k", {"acc1": 0.3}))
    nothing = read_published().model_copy(update={"tables": {}})
    assert effective_robustness_table(by_recipe(checkpoints_of(results)), nothing) is None
