"""benchmarks/study: its statistics by hand, its order of runs, and that runs of one process are those of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from conftest import RANK_ENVIRONMENT
from forked_ranks import start_program
from waiting import wait_for

from pipeline import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def study_modules() -> None:
    """Scripts of a folder import each other by name."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/study")]


def module(name: str) -> ModuleType:
    return __import__(name)


SMALL = {
    "title": "small",
    "train": "shards",
    "tokenizer": "tokenizer.model",
    "evaluation": ["web/eval/retrieval"],
    "metrics": {"R@5": "eval/retrieval/image_retrieval_recall@5"},
    "pairs": 128,
    "evaluations": 2,
    "seeds": 1,
    "recipe": {
        "base": "tiny_cpu",
        "model": {"name": "ViT-test-8", "image_size": 32},
        "data": {"workers": 0},
        "optimizer": {"lr": 1e-3},
        "train": {"global_batch_size": 16, "micro_batch_size": 16},
    },
    "arms": {"none": {"masking": {"strategy": "none"}}, "random 0.5": {"masking": {"strategy": "random"}}},
    "views": {"samples": ["none", "random 0.5"], "time": ["random 0.5"], "tail": ["random 0.5"]},
}


def test_means_and_differences_are_students() -> None:
    paired = module("paired")
    found = paired.estimate([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.30265, standard error 1 / sqrt(3)
    assert (found.mean, found.sd, found.n) == (2, 1, 3)
    assert found.high - 2 == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert paired.estimate([0.5]).high is None
    # with 2 degrees of freedom p = 1 - t / sqrt(2 + t^2)
    t = 2 * 3**0.5
    assert paired.paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert paired.paired_p([1.0]) is None
    assert paired.paired_p([1.0, 1.0]) is None


def test_seeds_come_one_after_the_other_and_further_arms_last() -> None:
    study_plan = module("study_plan")
    fields = SMALL | {"seeds": 2, "views": {"further": ["random 0.5"], "samples": ["none", "random 0.5"]}}
    runs = study_plan.Study.model_validate(fields).runs()
    assert [(run.view, run.seed) for run in runs] == [*[("samples", 0)] * 2, *[("samples", 1)] * 2, ("further", 0)]


def test_recipes_of_views_see_what_they_should() -> None:
    study_plan = module("study_plan")
    study = study_plan.Study.model_validate(SMALL)
    longer = study_plan.recipe_of(study, study_plan.Run("random 0.5", "time", 0), 1.5, Path("data"), Path("out"))
    assert longer["train"]["max_steps"] == 12
    assert longer["evaluation"]["every_steps"] * study.evaluations == 12
    tail = study_plan.recipe_of(study, study_plan.Run("random 0.5", "tail", 0), 1.0, Path("data"), Path("out"))
    assert [stage["train"]["max_steps"] for stage in tail["stages"]] == [7, 1]
    assert tail["stages"][1]["masking"] == {"strategy": "none"}


@pytest.mark.slow
def test_runs_of_one_process_are_those_of_their_own(tmp_path: Path, shards: Path, tokenizer_file: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "shards").symlink_to(shards)
    (data / "tokenizer.model").symlink_to(tokenizer_file)
    environment = os.environ | RANK_ENVIRONMENT
    synthetic = ["-m", "data_prep", "synthetic", str(data / "web"), "--train", "8", "--validation", "20"]
    subprocess.run([sys.executable, *synthetic], check=True, cwd=ROOT, env=environment, capture_output=True)
    study_file = tmp_path / "study.yaml"
    study_file.write_text(yaml.safe_dump(SMALL))
    output = tmp_path / "out" / "study"

    def run_study(action: str) -> str:
        command = [sys.executable, "benchmarks/study/run_study.py", action, str(study_file)]
        options = ["--data", str(data), "--output", str(output.parent), "--workers", "0"]
        done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run_study("time").count("s_per_step") == 2
    assert len(run_study("train").splitlines()) == 4
    assert run_study("train") == ""  # nothing is done twice
    runs = {line["name"]: line for line in map(json.loads, (output / "runs.jsonl").read_text().splitlines())}
    assert [point["step"] for point in runs["random_0.5-samples-0"]["curve"]] == [4, 8]

    # the second run of the lane, once more in a process of its own
    alone = tmp_path / "alone"
    recipe = str(output / "runs" / "random_0.5-samples-0.yaml")
    program = start_program(train.main, ["--recipe", recipe, f"train.output={alone}"], 1, tmp_path / "program")
    assert program.wait() == [0], program.output()
    lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    curve = runs["random_0.5-samples-0"]["curve"]
    assert [line["loss"] for line in lines if "eval/retrieval/image_retrieval_recall@5" in line] == [
        point["loss"] for point in curve
    ]
    # half of the 16 patches, and the class token
    assert curve[-1]["image_tokens"] == 128 * 9

    figures = module("collect_study").Outcomes(output).figures()
    assert {view: [*arms] for view, arms in figures["views"].items()} == SMALL["views"]
    of_time = figures["views"]["time"]["random 0.5"]
    assert of_time["seconds"] == pytest.approx(
        figures["step_s"]["random 0.5"] * of_time["pairs"] / 16, rel=0.01, abs=0.02
    )
    assert {tuple(compared["over"]) for compared in figures["comparisons"]} == {
        ("none", "samples"),
        ("random 0.5", "samples"),
    }


def test_tables_of_pages_are_those_of_the_record() -> None:
    draw_study, doc_tables = module("draw_study"), module("doc_tables")
    for (page, name), text in draw_study.tables(draw_study.recorded()).items():
        assert doc_tables.marked(name, text) in page.read_text(), "run python benchmarks/study/draw_study.py"


def interrupted_run(job: Any) -> None:
    """As training does: a signal is only noted, and the run ends with the code that says so."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    Path(job.name).write_text(str(os.getpid()))
    while not told:
        time.sleep(0.01)
    run_study = module("run_study")
    with (
        patch.object(run_study, "load_recipe", return_value=None),
        patch.object(run_study.training_run, "train", return_value=run_study.training_run.EXIT_INTERRUPTED),
    ):
        run_study.train(job)


@pytest.mark.parametrize("whole_study", [False, True])
def test_what_is_asked_to_stop_begins_no_other_run(whole_study: bool, tmp_path: Path) -> None:
    lanes = module("lanes")
    jobs = [lanes.Job(str(tmp_path / name), tmp_path, tmp_path / "log") for name in "abc"]
    study = multiprocessing.get_context("fork").Process(
        target=lanes.run_jobs,
        args=(interrupted_run, jobs, 1, time.monotonic() + 600, lambda *_: None),
    )
    study.start()
    wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "a").read_text(), "the first run")
    os.kill(int(study.pid or 0) if whole_study else int((tmp_path / "a").read_text()), signal.SIGTERM)
    study.join(600)
    assert study.exitcode == (143 if whole_study else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "log"]
