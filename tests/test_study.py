"""benchmarks/study: its statistics by hand, its order of runs, and that runs of one process are those of their own."""

from __future__ import annotations

import json
import math
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
import torch
import torch.nn.functional as F
import yaml
from conftest import RANK_ENVIRONMENT
from forked_ranks import start_program
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from waiting import wait_for

from model.masking import PatchedImages, draw_anchors
from pipeline import train
from pipeline.recipe_files import load_recipe

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
    assert tail["stages"][1]["optimizer"] == {"lr": 1e-4, "warmup_steps": 0}


def test_words_then_pairs_share_what_stages_of_a_recipe_share(tmp_path: Path) -> None:
    study_plan = module("study_plan")
    words = {"concepts": {"file": "c.jsonl", "objective": "mlm"}, "concept_stages_at": [0.25, 0.5]}
    pairs = {"masking": {"strategy": "none"}, "optimizer": {"lr": 1e-3, "warmup_steps": 2}}
    arms = SMALL["arms"] | {"words": words, "pairs": pairs, "both": {"parts": {"words": 0.5, "pairs": 0.5}}}
    study = study_plan.Study.model_validate(SMALL | {"arms": arms, "views": {"samples": ["both"]}})
    assert study.timed_arms() == ["words", "pairs"]
    fields = study_plan.recipe_of(study, study_plan.Run("both", "samples", 0), 1.0, Path("data"), Path("out"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    (_, first), (_, second) = load_recipe(str(tmp_path / "recipe.yaml"), []).by_stage()
    assert (first.concepts.objective, second.concepts.objective) == ("mlm", "none")
    assert {first.concepts.boundaries, second.concepts.boundaries} == {(16, 32)}
    assert (second.optimizer.lr, second.optimizer.warmup_steps) == (1e-3, 2)


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


def test_files_of_studies_say_what_runs_can_be(tmp_path: Path) -> None:
    """Every arm of every study makes a recipe that is one; the protocol goes with what the runs leave."""
    study_plan = module("study_plan")
    files = sorted((ROOT / "benchmarks/study").glob("*.yaml"))
    assert len(files) > 5
    for number, file in enumerate(files):
        study = study_plan.read_study(file)
        for arms in study.views.values():
            assert set(arms) <= study.arms.keys(), file
        for run in study.runs() if number % 3 == 0 or file.stem == "map_tiny" else ():
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(study_plan.recipe_of(study, run, 1.3, tmp_path, tmp_path / "run")))
            load_recipe(str(recipe), [])
        assert study_plan.Study.model_validate(yaml.safe_load(study.to_yaml())) == study


def test_runs_in_parts_take_the_time_of_their_parts() -> None:
    study_plan = module("study_plan")
    parts = {"random 0.5": 0.75, "none": 0.25}
    study = study_plan.Study.model_validate(SMALL | {"arms": SMALL["arms"] | {"then whole": {"parts": parts}}})
    assert study.step_s("then whole", {"none": 4.0, "random 0.5": 2.0}) == 2.5
    assert study.step_s("then whole", {"none": 4.0}) is None
    fields = study_plan.recipe_of(study, study_plan.Run("then whole", "time", 0), 1.0, Path("data"), Path("out"))
    assert [stage["train"]["max_steps"] for stage in fields["stages"]] == [6, 2]
    assert [stage["masking"]["strategy"] for stage in fields["stages"]] == ["random", "none"]
    assert "masking" not in fields


def pictures() -> PatchedImages:
    """Of soft colours, so that patches resemble their neighbours."""
    coarse = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return PatchedImages((255 * F.interpolate(coarse, 64, mode="bilinear")).to(torch.uint8), 8)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_clusters_keep_what_a_slow_apportionment_gives_them(alpha: float) -> None:
    experiments, images = module("experiments"), pictures()
    choice = experiments.balanced(images, 0.5, torch.Generator().manual_seed(1), alpha, is_weighted=True)
    features = experiments.colour_and_place(images)
    anchors = draw_anchors(4, 64, 0.25, torch.Generator().manual_seed(1))
    for image in range(4):
        centres = features[image, anchors[image]]
        nearest = [int((centres - patch).norm(dim=1).argmin()) for patch in features[image]]
        sizes = [nearest.count(cluster) for cluster in range(16)]
        kept = [int(patch) - 64 * image for patch in choice.masks.selection.kept_K if patch // 64 == image]
        found = [sum(nearest[patch] == cluster for patch in kept) for cluster in range(16)]
        # Sainte-Lague: no seat taken had a smaller quotient than one that is left
        taken = [n**alpha / (seats - 0.5) for n, seats in zip(sizes, found, strict=True) if seats]
        left = [n**alpha / (seats + 0.5) for n, seats in zip(sizes, found, strict=True) if seats < n]
        assert len(kept) == 32
        assert min(taken) >= max(left) - 1e-6
        expected = [math.log(sizes[nearest[patch]] / found[nearest[patch]]) for patch in kept]
        assert choice.log_size_BS[image].tolist() == pytest.approx(expected, abs=1e-5)


def test_kept_patches_stand_for_those_that_resemble_them() -> None:
    experiments, images = module("experiments"), pictures()
    choice = experiments.representative(images, 0.5, torch.Generator().manual_seed(1), is_merged=True)
    patches, features = images.patches(), experiments.colour_and_place(images)
    merged = experiments.MergedImages(images.images_BCHW, 8, choice.mean_BSL).gather(choice.masks.selection.kept_K)
    kept = choice.masks.selection.kept_K.view(4, 32) % 64
    for image in range(4):
        groups: dict[int, list[int]] = {}
        for place in range(64):
            distances = (features[image, kept[image]] - features[image, place]).norm(dim=1)
            groups.setdefault(int(distances.argmin()), []).append(place)
        for slot, group in groups.items():
            assert torch.allclose(merged[32 * image + slot], patches[image, group].mean(dim=0), atol=1e-5)
            assert float(choice.log_size_BS[image, slot]) == pytest.approx(math.log(len(group)), abs=1e-5)
    bias = experiments.bias_of_sizes(torch.tensor([[0.0, 1.0]]), 2)
    assert bias.tolist() == [[[[0, 1], [0, 1]]] * 2]


def test_the_record_is_of_the_studies_that_are_there() -> None:
    """What was decided before the runs is what is written down beside their figures; older records do not hold it."""
    study_plan = module("study_plan")
    for name, part in module("draw_study").recorded().items():
        file = ROOT / "benchmarks/study" / f"{name}.yaml"
        if "study" in part:
            assert study_plan.Study.model_validate(part["study"]) == study_plan.read_study(file)
            ran = {arm for arms in part["views"].values() for arm in arms}
            assert ran <= {arm for arms in study_plan.read_study(file).views.values() for arm in arms}
    for directory in (ROOT / "benchmarks/results/study").glob("*/"):
        kept = study_plan.read_study(directory / "study.yaml")
        assert kept == study_plan.read_study(ROOT / "benchmarks/study" / f"{directory.name}.yaml")
        names = {run.name for run in kept.runs()}
        lines = (directory / "runs.jsonl").read_text().splitlines() if (directory / "runs.jsonl").exists() else []
        assert {json.loads(line)["name"] for line in lines} <= names


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


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], level: float) -> None:
    """One after the other from the least, until one is not below the level over those that are left."""
    rejected, left = set[int](), len(p_values)
    for index in sorted(range(len(p_values)), key=p_values.__getitem__):
        if p_values[index] * left > level:
            break
        rejected.add(index)
        left -= 1
    found = module("paired").holm(p_values)
    assert {index for index, p in enumerate(found) if p <= level} == rejected


def test_confirmed_are_differences_over_none_and_random(tmp_path: Path) -> None:
    confirm, study_plan = module("confirm"), module("study_plan")
    fields = SMALL | {"seeds": 3, "first_seed": 10, "views": {"time": ["none", "random 0.5", "cluster"]}}
    fields["arms"] = {**SMALL["arms"], "cluster": {"masking": {"strategy": "cluster"}}}
    study = study_plan.Study.model_validate(fields)
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    metric = [*study.metrics][-1]
    reached = {"none": (0.1, 0.2, 0.3), "random 0.5": (0.2, 0.3, 0.5), "cluster": (0.4, 0.5, 0.6)}
    lines = []
    for run in study.runs():
        curve = [dict.fromkeys(study.metrics, reached[run.arm][run.seed - 10])]
        lines.append({"name": run.name, "arm": run.arm, "view": run.view, "seed": run.seed, "curve": curve})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = confirm.corrected(confirm.comparisons(confirm.Outcomes(tmp_path), "time"))
    pairs = [("random 0.5", "none"), ("cluster", "none"), ("cluster", "random 0.5")]
    assert [(line["arm"], line["over"]) for line in found] == pairs
    assert {(line["set"], line["metric"], line["view"], line["seeds"]) for line in found} == {
        (study.evaluation[0], metric, "time", 3)
    }
    assert [line["difference"] for line in found] == pytest.approx([0.4 / 3, 0.3, 0.5 / 3], abs=1e-5)
    # cluster over none is the same in each seed; the two others have standard errors of a thirtieth
    alone = [2 * stats.t.sf(difference * 30, 2) for difference in (0.4 / 3, 0.5 / 3)]
    assert [line["p"] for line in found] == pytest.approx([alone[0], 0, alone[1]], abs=1e-4)
    assert [line["p_corrected"] for line in found] == pytest.approx([2 * alone[1], 0, 2 * alone[1]], abs=1e-4)
