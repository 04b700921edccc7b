"""Tables as papers print them, published rows, seeds and costs, CSV and LaTeX: against figures worked out by hand."""

from __future__ import annotations

import csv
import io
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from report_material import HOSTILE, checkpoints_of, result_of, write_run

from formats.errors import UserError
from pipeline.evaluation.results import Result
from pipeline.reporting.charts import draw_cost_charts, draw_robustness
from pipeline.reporting.inputs import read_inputs
from pipeline.reporting.tables.overview import dataset_tables, rarity_table
from pipeline.reporting.tables.paper_tables import paper_tables
from pipeline.reporting.tables.papers import LAYOUTS, RARITY, ZERO_SHOT, Published, read_published
from pipeline.reporting.tables.rows import by_recipe
from pipeline.reporting.tables.table import Cell, Column, Row, Table, mark_places, to_csv, to_latex

PUBLISHED = read_published()


def tables_of(results: list[Result], published: Published = PUBLISHED) -> dict[str, Table]:
    entries = by_recipe(checkpoints_of(results))
    return {table.name: table for table in paper_tables(entries, published, cost_label="")}


def column(table: Table, label: str) -> dict[str, str]:
    """A column's cells by row label."""
    index = [str(column) for column in table.columns].index(label)
    return {row.label: str(row.cells[index]) for row in table.rows}


def seventeen(run: str, leave_out: str = "") -> list[Result]:
    """The n-th of the 17 sets with n percent, the names as different tools write them."""
    names = [measure.sets[-1] for measure in ZERO_SHOT.measures]
    return [
        result_of(run, f"wds_vtab-{name}" if index % 2 else name.upper(), {"acc1": index / 100})
        for index, name in enumerate(names, 1)
        if name != leave_out
    ]


def test_published_columns_are_those_of_the_groups_and_their_means_fit() -> None:
    groups = {group.name: group for group in (*LAYOUTS, RARITY)}
    assert set(PUBLISHED.tables) == set(groups)
    unlike = set()
    for name, table in PUBLISHED.tables.items():
        group = groups[name]
        assert list(table.columns) == [item.key for item in (*group.measures, *group.means)]
        assert list(table.rows) == list(PUBLISHED.methods) or table.source  # systems of another paper
        for method in table.rows:
            figures = table.figures(method)
            for mean in group.means:
                if abs(statistics.fmean(figures[key] for key in mean.of) - figures[mean.key]) > 0.1:
                    unlike.add((name, method, mean.key))
    # printed so in the paper, which published.yaml says
    assert unlike == {("robustness", "CLIP", "ood"), ("robustness", "A-CLIP", "ood")}


def test_mean_of_seventeen_only_where_all_are_there() -> None:
    table = tables_of([*seventeen("whole"), *seventeen("part", leave_out="dtd")])["zero_shot"]
    means = column(table, "mean")
    assert means["whole"] == "9.00"
    assert means["part"] == ""
    assert means["cluster masking"] == "36.9"
    assert column(table, "DTD")["part"] == ""
    table = tables_of(seventeen("part", leave_out="dtd"))["zero_shot"]
    assert "mean" not in map(str, table.columns)
    assert any("17 sets is left out (missing: DTD)" in note for note in table.notes)


def test_no_row_has_all_sets_though_each_set_has_a_row() -> None:
    table = tables_of([*seventeen("a", leave_out="dtd"), *seventeen("b", leave_out="cifar10")])["zero_shot"]
    assert "The mean of 17 sets is left out (no row has all of them)." in table.notes


def test_published_rows_are_marked_and_never_the_best() -> None:
    results = [
        result_of("a", "flickr8k", {"text_retrieval_recall@1": 0.01}),
        result_of("b", "flickr8k", {"text_retrieval_recall@1": 0.02}),
    ]
    table = tables_of(results)["retrieval"]
    assert [str(column) for column in table.columns] == ["Flickr8k text R@1"]
    assert table.headings == [("Flickr8k text", 1)]
    assert [(row.label, row.cells[0].mark) for row in table.of_kind("ours")] == [("a", "second"), ("b", "best")]
    published = table.of_kind("published")
    assert [row.label for row in published] == list(PUBLISHED.methods)
    assert all(not row.cells[0].mark and row.note.startswith("published") for row in published)
    assert published[3].cells[0].text == "57.0"
    assert any("arXiv 2503.17080" in note for note in table.notes)
    assert not tables_of(results, published=Published())["retrieval"].of_kind("published")


def test_robustness_means_and_groups_without_a_figure() -> None:
    accuracies = {
        "imagenet1k": 0.6,
        "imagenetv2": 0.5,
        "imagenet-a": 0.1,
        "imagenet-r": 0.3,
        "imagenet-o": 0.4,
        "imagenet_sketch": 0.2,
    }
    tables = tables_of([result_of("a", name, {"acc1": value}) for name, value in accuracies.items()])
    assert set(tables) == {"robustness"}
    assert column(tables["robustness"], "ID")["a"] == "35.00"
    assert column(tables["robustness"], "OOD")["a"] == "30.00"


def test_charts_have_published_points_beside_ours(tmp_path: Path) -> None:
    accuracies = dict.fromkeys(("imagenet1k", "imagenetv2", "imagenet-a", "imagenet-r", "imagenet-o"), 0.5)
    results = [result_of("base", name, {"acc1": value}) for name, value in accuracies.items()]
    inputs = read_inputs([write_run(tmp_path / "base", results)])
    (chart,) = draw_cost_charts(inputs.checkpoints, inputs.runs, PUBLISHED)
    assert "GPU-hours" in chart.description
    assert b"OpenCLIP ViT-B/16" in chart.light_svg
    assert draw_cost_charts(inputs.checkpoints, inputs.runs, Published()) == []  # a single point is no chart
    assert draw_cost_charts(checkpoints_of(results), (), PUBLISHED) == []
    assert draw_robustness(by_recipe(inputs.checkpoints), PUBLISHED) is None
    whole = [*results, result_of("base", "imagenet_sketch", {"acc1": 0.5})]
    robustness = draw_robustness(by_recipe(checkpoints_of(whole)), PUBLISHED)
    assert robustness is not None
    assert b"A-CLIP" in robustness.dark_svg
    assert b"base" in robustness.dark_svg


def test_accuracy_by_rarity_stands_in_one_table() -> None:
    thirds = {"acc1/rare": 0.1, "acc1/tail_clusters": 0.2}
    results = [result_of("a", "wds_let-it-wag", {"acc1": 0.25}), result_of("a", "cifar10", {"acc1": 0.5} | thirds)]
    table = rarity_table(checkpoints_of(results), PUBLISHED)
    assert table
    assert list(map(str, table.columns)) == ["Let It Wag!", "cifar10 rare", "cifar10 tail clusters"]
    assert [cell.text for cell in table.of_kind("ours")[0].cells] == ["25.00", "10.00", "20.00"]
    assert column(table, "Let It Wag!")["DynamiCS, LAION-400M"] == "45.5"
    assert any("2604.27932" in note for note in table.notes)
    alone = rarity_table(checkpoints_of(results[1:]), PUBLISHED)
    assert alone
    assert (alone.of_kind("published"), alone.notes) == ([], ())  # nothing of theirs to show
    assert rarity_table(checkpoints_of([result_of("a", "cifar10", {"acc1": 0.5})]), PUBLISHED) is None


def test_what_cannot_be_compared_is_said() -> None:
    table = tables_of([result_of("a", "cifar10", {"acc1": 0.5}, samples=50)])["zero_shot"]
    assert "cifar10 (50, not 10,000)" in table.warning
    twice = [result_of("a", name, {"acc1": 0.5}, samples=10_000) for name in ("cifar10", "wds_cifar10")]
    assert "cifar10 and wds_cifar10, which are the same set" in tables_of(twice)["zero_shot"].warning
    assert not tables_of(twice[:1])["zero_shot"].warning


def test_seeds_become_one_row_with_their_spread_and_mean_cost(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"base_s{seed}", [result_of(f"base_s{seed}", "cifar10", {"acc1": acc1})], seed=seed)
        for seed, acc1 in enumerate((0.1, 0.2, 0.3))
    ]
    runs.append(write_run(tmp_path / "other", [result_of("other", "cifar10", {"acc1": 0.25})], strategy="random"))
    inputs = read_inputs(runs)
    table = next(iter(paper_tables(by_recipe(inputs.checkpoints), PUBLISHED, "GPU-hours")))
    ours = table.of_kind("ours")
    assert [row.label for row in ours] == ["base", "other"]
    assert "mean ± sd of 3 seeds" in ours[0].note
    assert column(table, "CIFAR10")["base"] == "20.00 ± 10.00"
    assert ours[1].cells[0].mark == "best"
    # 72 s on five devices
    assert column(table, "GPU-hours") == {"base": "0.1", "other": "0.1", "chance": ""} | dict.fromkeys(
        PUBLISHED.methods, ""
    )


def test_one_seed_by_two_names_is_not_two_seeds(tmp_path: Path) -> None:
    results = [result_of("base", "cifar10", {"acc1": 0.1})]
    results.append(replace(results[0], checkpoint=f"/elsewhere/{results[0].checkpoint}"))
    inputs = read_inputs([write_run(tmp_path / "base", results)])
    assert [len(entry.seeds) for entry in by_recipe(inputs.checkpoints)] == [1, 1]


def test_intervals_stand_beside_figures_and_not_beside_means() -> None:
    metric = "text_retrieval_recall@1"
    result = replace(result_of("a", "flickr8k", {metric: 0.4}), intervals={metric: [0.351, 0.449]})
    for table in (tables_of([result])["retrieval"], *dataset_tables(checkpoints_of([result]))):
        assert str(table.of_kind("ours")[0].cells[0]) == "40.00 [35.1, 44.9]"
        assert "In brackets: 95 % interval." in table.notes
    whole = [replace(result, intervals={"acc1": [0, 1]}) for result in seventeen("whole")]
    assert column(tables_of(whole)["zero_shot"], "mean")["whole"] == "9.00"


def test_marks_of_tied_rows_and_of_one_row() -> None:
    rows = [Row(name, (Cell(f"{value}", value),)) for name, value in (("a", 3.0), ("b", 3.0), ("c", 2.0), ("d", 1.0))]
    assert [row.cells[0].mark for row in mark_places(rows, 1)] == ["best", "best", "second", ""]
    assert [row.cells[0].mark for row in mark_places(rows[:1], 1)] == [""]


def test_csv_can_be_read_back() -> None:
    rows = (
        Row('=cmd|"x", y', (Cell("33.33", 100 / 3, "± 0.10"), Cell("+1")), "a,\nb"),
        Row("chance", (Cell("10.00", 10.0), Cell("")), kind="chance"),
    )
    table = Table("t", "", "", (Column("R@1", "set"), Column("-x")), rows)
    header, first, second = csv.reader(io.StringIO(to_csv(table)))
    assert header == ["kind", "checkpoint", "note", "set R@1", "set R@1 spread", "'-x"]
    assert first == ["ours", '\'=cmd|"x", y', "a,\nb", "33.3333", "± 0.10", "'+1"]
    assert second == ["chance", "chance", "", "10", "", ""]


def test_latex_is_balanced_and_escaped() -> None:
    results = [
        result_of(name, "flickr8k", {"text_retrieval_recall@1": share, "image_retrieval_recall@1": share})
        for name, share in ((HOSTILE.replace("/", ""), 0.5), ("b_1", 0.4), ("c", 0.3))
    ]
    text = to_latex(tables_of(results)["retrieval"])
    assert r"\textbf{50.00}" in text
    assert r"\underline{40.00}" in text
    assert r"b\_1 & " in text
    assert r"cluster masking$^\dagger$ & 57.0 & 42.0 \\" in text
    assert r" & \multicolumn{1}{c}{Flickr8k text} & \multicolumn{1}{c}{Flickr8k image} \\" in text
    for command in ("begin{tabular}{lrr}", "toprule", "bottomrule", "end{tabular}"):
        assert text.count(f"\\{command}") == 1
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    # every row has three cells, whatever the names hold
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines if "footnotesize" not in line} == {2}
    without_maths = re.sub(r"\$(\^\\dagger|\\pm|\\times)\$", "", text.split("\n", 1)[1])
    assert not re.findall(r"(?<!\\)[%#$_^~]", without_maths)
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables: {zero_shot: {columns: [a, b], rows: {CLIP: [1.0]}}}", "CLIP has 1 figures for 2 columns"),
        ("tabels: {}", "tabels"),
        ("a: [", "is not YAML"),
    ],
)
def test_published_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_published(tmp_path / "rows.yaml")
    with pytest.raises(UserError, match="cannot read the published rows"):
        read_published(tmp_path / "absent.yaml")
