"""A run that is evaluated, watched, traced and logged trains the same weights as one that is not, to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import jpeg_bytes, write_tar
from forked_ranks import start_program
from safetensors.torch import load_file

from formats.errors import UserError
from pipeline import evaluate, train
from pipeline.evaluation.results import read_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retrieval set of seven pictures: with batches of two, ranks get unequal shares."""
    directory = tmp_path_factory.mktemp("sets") / "pictures"
    (directory / "test").mkdir(parents=True)
    members = []
    for number in range(7):
        members += [(f"{number}.jpg", jpeg_bytes(number)), (f"{number}.txt", f"picture number {number}".encode())]
    write_tar(directory / "test" / "0.tar", members)
    (directory / "test" / "nshards.txt").write_text("1")
    return directory


def run_training(options: list[str], ranks: int, run: Path) -> str:
    program = start_program(train.main, [*options, f"train.output={run}"], ranks, run.with_name(f"{run.name}_output"))
    assert program.wait() == [0] * ranks, program.output()
    return program.output()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("ranks", "template"), [(1, "zero1_fp32"), (2, "zero3_fp32")])
def test_evaluation_during_training(
    ranks: int, template: str, tiny_options: list[str], pictures: Path, tmp_path: Path
) -> None:
    stage = {"zero_optimization": {"stage": int(template[4])}}
    (tmp_path / "template.json").write_text(json.dumps(stage))
    options = [*tiny_options, f"train.deepspeed_config={tmp_path / 'template.json'}", "train.max_steps=6"]
    options += ["train.log_every_steps=4", "data.workers=1"]
    run_training([*options, "log.watch_steps=false"], ranks, tmp_path / "plain")
    watched = ["evaluation.every_steps=3", "evaluation.batch_size=2", f"evaluation.data=[{pictures}]"]
    watched += ["log.profile_steps=[2,3]"]
    output = run_training([*options, *watched], ranks, tmp_path / "watched")

    plain, other = (sorted((tmp_path / name / "checkpoints").glob("step_*"))[-1] for name in ("plain", "watched"))
    weights = load_file(other / "model.safetensors")
    for name, value in load_file(plain / "model.safetensors").items():
        assert value.equal(weights[name]), name

    assert [line["step"] for line in lines(tmp_path / "plain")] == [4, 6]
    metrics = lines(tmp_path / "watched")
    assert [line["step"] for line in metrics] == [3, 4, 6]
    assert ["eval/pictures/image_retrieval_recall@1" in line for line in metrics] == [True, False, True]
    arguments = ["--checkpoint", str(other), "--data", str(pictures), "--output", str(tmp_path / "results")]
    assert evaluate.main([*arguments, "--batch-size", "2"]) == 0
    (result,) = read_results(tmp_path / "results" / "results.jsonl")
    assert {f"eval/pictures/{name}": value for name, value in result.metrics.items()} == {
        name: value for name, value in metrics[-1].items() if name.startswith("eval/")
    }
    assert "grad_norm_image" in metrics[0]
    assert "grad_norm_image" not in lines(tmp_path / "plain")[0]

    trace = tmp_path / "watched" / "profile" / "steps_2_to_3.json.gz"
    assert trace.stat().st_size > 1000
    assert "aten::" in trace.with_name("steps_2_to_3.txt").read_text()
    assert f"trace of the steps in {trace}" in output


def test_wandb_goes_on_with_the_same_run(tiny_options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'cluster-clip[wandb]'")
    options = [*tiny_options, "train.deepspeed_config=zero1_fp32", "log.wandb=offline", "train.save_every_steps=2"]
    run = tmp_path / "run"
    run_training([*options, "train.max_steps=2"], 1, run)
    run_id = (run / "wandb_id").read_text()
    assert len(list((run / "wandb").glob(f"offline-run-*-{run_id.strip()}"))) == 1
    assert (run / "wandb_id").read_text() == run_id


def test_what_cannot_be_observed_is_one_line(
    tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*tiny_options, "train.deepspeed_config=zero1_fp32", f"train.output={tmp_path / 'run'}"]
    program = start_program(train.main, [*options, f"evaluation.data=[{tmp_path / 'none'}]"], 1, tmp_path / "out")
    assert program.wait() == [2]
    assert f"error: no evaluation set at {tmp_path / 'none'}" in program.output()
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"log: profile_steps are \[first, last\]"):
        train.main([*options, "log.profile_steps=[3,2]"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    from pipeline.recipe import LogSection
    from pipeline.training.observing.run_logger import WandbRun

    with pytest.raises(UserError, match=r"log\.wandb=online needs wandb: pip install 'cluster-clip\[wandb\]'"):
        WandbRun(tmp_path, LogSection(wandb="online"))
