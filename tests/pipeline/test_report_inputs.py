"""What a report is made of: runs that names do not tell apart, and files that are not what they should be."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_user import outcome
from report_material import checkpoints_of, result_of, write_run
from test_result_pictures import write_retrieval_output

from formats.files import write_json
from formats.programs import exit_code_of
from pipeline import report
from pipeline.evaluation.results import Result, write_results
from pipeline.reporting.inputs import ReportInputs, read_inputs, shortest_names
from pipeline.reporting.tables.overview import dataset_tables, headline_table
from pipeline.training.checkpoints.checkpoint import COMPLETE, FORMAT_VERSION, WEIGHTS, FileRecord

ACC = {"acc1": 0.25}


def write_twin(directory: Path, hours: float) -> Path:
    """A run that took so many hours on one device, evaluated under a path that begins above its parent."""
    home = f"{directory.parent.name}/{directory.name}"
    result = replace(result_of("x", "cifar10", ACC), checkpoint=f"{home}/checkpoints/step_00000020")
    write_run(directory, [result])
    write_json(directory / "run.json", {"world_size": 1, "device": "cpu"})
    line = {"step": 20, "samples_seen": 1280, "loss": 2.0, "wall_time_s": 3600 * hours}
    (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return directory


def write_checkpoint(run: Path, sha256: str, step: int = 20) -> None:
    """What a run says of a checkpoint whose files are of no interest."""
    record = asdict(FileRecord(1, sha256))
    fields = {"step": step, "samples_seen": 64 * step, "stage": None, "stage_starts": [], "world_size": 1}
    fields |= {"format_version": FORMAT_VERSION, "zero_stage": 1, "precision": "fp32", "versions": {}, "recipe": {}}
    directory = run / "checkpoints" / f"step_{step:08d}"
    directory.mkdir(parents=True)
    write_json(directory / COMPLETE, {**fields, "files": {WEIGHTS: record}})


def costs(inputs: ReportInputs) -> dict[str, float | None]:
    return {one.label: one.cost.device_h if one.cost else None for one in inputs.checkpoints}


def test_runs_of_one_name_are_told_apart_in_every_table_and_file(tmp_path: Path) -> None:
    runs = [write_twin(tmp_path / "low" / "seed0", 1), write_twin(tmp_path / "high" / "seed0", 2)]
    inputs = read_inputs(runs)
    assert [run.name for run in inputs.runs] == ["low/seed0", "high/seed0"]
    assert costs(inputs) == {"low/seed0": 1, "high/seed0": 2}
    report.main([*map(str, runs), "--output", str(tmp_path / "out")])
    for file in ("report.md", "report.html", "tables/set_0_cifar10.csv", "tables/training.tex", "figures/loss.svg"):
        text = (tmp_path / "out" / file).read_text()
        assert "low/seed0" in text
        assert "high/seed0" in text


def test_a_run_does_not_lend_its_cost_to_another_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = write_twin(tmp_path / "low" / "seed0", 1), write_twin(tmp_path / "high" / "seed0", 2)
    inputs = read_inputs([low, high / "evaluation"])
    assert costs(inputs) == {"low/seed0": 1, "high/seed0": None}
    table = headline_table(inputs.checkpoints, inputs.runs)
    assert table
    assert "No device-hours of high/seed0: no run given wrote those weights" in " ".join(table.notes)
    # evaluated from the folder of either: the paths are the same letters
    for run in (low, high):
        shutil.rmtree(run / "evaluation")
        short = replace(result_of("x", "cifar10", ACC), checkpoint="seed0/checkpoints/step_00000020")
        write_results(run.parent / "results", [short])
    monkeypatch.chdir(low.parent)
    assert costs(read_inputs([low, high.parent / "results"])) == {"high/seed0": None}
    assert costs(read_inputs([low, high, low.parent / "results", high.parent / "results"])) == {
        "low/seed0": 1,
        "high/seed0": 2,
    }


def test_weights_tell_a_run_wherever_it_lies(tmp_path: Path) -> None:
    result = replace(result_of("x", "cifar10", ACC), checkpoint="/gone/first/checkpoints/step_00000020")
    runs = [write_run(tmp_path / name) for name in ("moved", "first")]
    write_checkpoint(runs[0], "a" * 64)
    write_checkpoint(runs[1], "b" * 64)
    write_results(tmp_path / "results", [replace(result, weights_sha256="a" * 64)])
    (checkpoint,) = read_inputs([*runs, tmp_path / "results"]).checkpoints
    assert checkpoint.label == "moved"
    assert checkpoint.cost


def test_a_run_trained_anew_is_not_the_one_that_was_evaluated(tmp_path: Path) -> None:
    results = [replace(result_of("first", "cifar10", ACC), weights_sha256=sha * 64) for sha in "ab"]
    results = [replace(one, checkpoint=str(tmp_path / "first/checkpoints/step_00000020")) for one in results]
    run = write_run(tmp_path / "first", results)
    write_checkpoint(run, "b" * 64)
    assert {label: bool(cost) for label, cost in costs(read_inputs([run])).items()} == {
        "first (aaaaaaaa)": False,
        "first (bbbbbbbb)": True,
    }


def test_a_run_that_was_moved_with_its_evaluation_keeps_its_cost(tmp_path: Path) -> None:
    run = write_twin(tmp_path / "old" / "seed0", 3)
    shutil.move(run, tmp_path / "elsewhere")
    (tmp_path / "new").mkdir()
    shutil.move(tmp_path / "elsewhere", tmp_path / "new" / "seed0")
    assert costs(read_inputs([tmp_path / "new" / "seed0"])) == {"seed0": 3}
    # but not if what lies there is of several runs
    other = replace(result_of("x", "cifar10", ACC), checkpoint="gone/seed0/checkpoints/step_00000020")
    write_results(tmp_path / "new" / "seed0" / "evaluation", [other])
    assert set(costs(read_inputs([tmp_path / "new" / "seed0"])).values()) == {None}


def test_two_sets_of_one_name_are_both_shown_and_said_to_differ() -> None:
    results = [replace(result_of("a", "birds", {"acc1": share}), content_sha256=f"{share}") for share in (0.2, 0.4)]
    (table,) = dataset_tables(checkpoints_of(results))
    assert [row.cells[0].text for row in table.of_kind("ours")] == ["20.00", "40.00"]
    assert "different images or captions" in table.warning


def test_a_set_that_goes_by_two_names_is_one_column() -> None:
    results = [result_of("a", "cifar10", {"acc1": 0.2}), result_of("b", "wds_vtab-cifar10", {"acc1": 0.4})]
    table = headline_table(checkpoints_of(results))
    assert table
    assert [[cell.text for cell in row.cells] for row in table.of_kind("ours")] == [["20.00"], ["40.00"]]


def test_a_mean_of_one_category_is_no_second_column() -> None:
    metrics = {"acc": 0.6, "acc/replace_obj": 0.5, "acc/swap_att": 0.6, "acc/add_att": 0.7}
    means = {"acc/object": 0.5, "acc/attribute": 0.65}
    (table,) = dataset_tables(checkpoints_of([result_of("a", "pairs", metrics | means)]))
    assert [column.label for column in table.columns] == ["acc", "replace_obj", "swap_att", "add_att", "attribute"]
    assert "Not shown twice: object is replace_obj." in table.notes


PATHS = st.lists(st.lists(st.sampled_from(["a", "b", "seed0"]), min_size=1, max_size=4), min_size=1, max_size=6)


@given(PATHS)
def test_names_are_the_shortest_ends_that_differ(parts: list[list[str]]) -> None:
    paths = {Path(*own) for own in parts}
    names = shortest_names(paths)
    assert len(set(names.values())) == len(paths)
    for path, name in names.items():
        own = Path(name).parts
        assert path.parts[-len(own) :] == own
        for shorter in range(1, len(own)):
            assert any(other != path and other.parts[-shorter:] == path.parts[-shorter:] for other in paths)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with results, features and a set, and a file of published rows."""
    directory = tmp_path_factory.mktemp("whole")
    run = write_run(directory / "run", [result_of("run", "cifar10", ACC), result_of("run", "imagenet1k", ACC)])
    write_checkpoint(run, "a" * 64)
    write_retrieval_output(directory / "pairs", run / "evaluation")
    shutil.copy(report.PUBLISHED_FILE, directory / "published.yaml")
    return directory


JSON = ["[]", "{}", "null", "3", '"x"', '{"step": []}', '[{"step": 1}]', '{"step": 1, "loss": "high", "stage": 3}']
LINES = ['{"step": 1e999}', '{"step": 7, "wall_time_s": 1e400, "samples_seen": "many"}', "[" * 100_000, "\x00", ""]
WHAT_IS_DRAWN = ("metrics.jsonl", "run.json", "published.yaml")
OTHER = [
    *(
        text.encode()
        for text in (*JSON, *LINES, "just words\n", "a: [1", "tables: {robustness: {columns: [a], rows: {}}}")
    ),
    b"\xff\xfe\x00bytes",
    random.Random(0).randbytes(999),
]


@pytest.mark.slow
def test_any_other_content_is_one_line_or_a_report(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) > 10
    for number, file in enumerate(files):
        for content in (*random.Random(number).sample(OTHER, 7), None):
            work = tmp_path / "work"
            shutil.copytree(whole, work, symlinks=True)
            (work / file).unlink()
            if content is None:
                (work / file).mkdir()
            else:
                (work / file).write_bytes(content)
            check_one_line(work, file.name in WHAT_IS_DRAWN, f"{file} {content!r:.60}", capsys)
            shutil.rmtree(work)


def check_one_line(work: Path, is_drawn: bool, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole report where odd content could come to be drawn, else all reading that comes before."""
    arguments = [str(work / "run"), "--published", str(work / "published.yaml"), "--output", str(work / "out")]
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    code = exit_code_of(lambda: report.main(arguments) if is_drawn else 0 * len(read_inputs([work / "run"]).runs))
    errors = capsys.readouterr().err
    assert code in (0, 2), f"{what}: {errors}"
    if code == 2:
        assert errors.count("\n") == 1, f"{what}: {errors}"
        assert errors.startswith("error: "), what
        assert not (work / "out").exists(), what
    assert {path: path.read_bytes() for path in before} == before


def test_what_may_not_be_read_is_one_line(whole: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "recipe.yaml", "run.json", "evaluation/results.jsonl", "evaluation", "."):
        run = tmp_path / "run"
        shutil.copytree(whole / "run", run)
        (run / name).chmod(0)
        code, said = outcome(report.main, [str(run), "--output", str(tmp_path / "out")], tmp_path / "log")
        assert (code, said.count("\n"), (tmp_path / "out").exists()) == (2, 1, False), said
        assert str(run) in said
        (run / name).chmod(0o700)
        shutil.rmtree(run)


def test_an_output_that_is_a_file(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert exit_code_of(lambda: report.main([str(whole / "run"), "--output", str(tmp_path / "out")])) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "out").read_text() == "mine"


def test_lines_of_the_log_that_cannot_be_read_are_counted(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("no step\n" + log.read_text() + '{"step": "x"}\n{"step": 21, "lo')
    (run,) = read_inputs([tmp_path / "run"]).runs
    assert (len(run.steps), run.damaged_lines) == (2, 2)
    report.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert "2 lines of the log of run cannot be read" in (tmp_path / "out" / "report.md").read_text()


def test_results_keep_what_they_say(tmp_path: Path) -> None:
    """A line of results as it was written by the first version."""
    line = {
        "model": "ViT-tiny-8",
        "checkpoint": "runs/first/checkpoints/step_00000020",
        "dataset": "cifar10",
        "task": "zeroshot_classification",
        "metrics": ACC,
        "samples": 10_000,
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    (checkpoint,) = read_inputs([tmp_path / "results.jsonl"]).checkpoints
    assert checkpoint.label == "first"
    assert checkpoint.results == (Result(**line),)  # type: ignore[arg-type]
