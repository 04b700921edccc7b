"""Training through its command line: launchers, resume, signals, faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RANK_ENVIRONMENT, ROOT, write_shards
from faulty_train import start
from forked_ranks import start_program
from safetensors.torch import load_file
from waiting import PATIENCE_S

from pipeline import train
from pipeline.inference import load_for_inference
from pipeline.training.checkpoints.checkpoint import newest_checkpoint

TRAIN = "pipeline/train.py"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def finish(options: list[str], run: Path, world_size: int = 2) -> str:
    """Start or continue a run, to its end; returns what it prints."""
    program = start(options, run, world_size, {})
    assert program.wait() == [0] * world_size, program.outputs()
    return program.output()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, launch: Callable, tiny_options: list[str]) -> Path:
    """Eight steps on two ranks under the deepspeed launcher, checkpoints at 4 and 8."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    options = [*tiny_options, "train.max_steps=8", "train.save_every_steps=4", f"train.output={run}"]
    done = launch(TRAIN, *options, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "batch: 16 = 8 micro x 1 accumulation x 2 ranks; each pair meets 15 negatives" in done.stdout
    assert "steps: 96 samples in 3 shards = 6.0 steps per epoch; 8 steps = 1.33 epochs = 128 samples" in done.stdout
    return run


@pytest.mark.slow
def test_a_run_leaves_what_the_formats_promise(finished_run: Path) -> None:
    lines = metrics(finished_run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert line["mask_ratio"] == pytest.approx(0.5, abs=1e-6)
        assert line["samples_seen"] == 16 * line["step"]
        assert line["grad_norm"] > 0
        assert 0 <= line["data_wait_share"] < 1
        assert line["image_tokens"] == 8 * 16 / 2 + 8
    record = json.loads((finished_run / "run.json").read_text())
    assert record["finished"]
    assert record["world_size"] == 2
    assert (finished_run / "recipe.yaml").read_text().startswith("model:\n  name: ViT-test-8")
    assert list((finished_run / "tensorboard").iterdir())
    names = [path.name for path in sorted((finished_run / "checkpoints").glob("step_*"))]
    assert names == ["step_00000004", "step_00000008"]
    assert (finished_run / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    model = load_for_inference(str(finished_run), torch.device("cpu"))
    assert (model.name, model.step, model.samples_seen) == ("ViT-test-8", 8, 128)
    assert model.clip.encode_text(model.tokenizer.encode_batch(["a cat"])).shape == (1, 32)


@pytest.mark.slow
def test_activation_checkpointing_changes_no_bit(finished_run: Path, tmp_path: Path, tiny_options: list[str]) -> None:
    """Every block is computed twice, from the same masks."""
    run = tmp_path / "recomputing"
    finish([*tiny_options, "train.max_steps=8", "train.activation_checkpointing=true"], run)
    for name in ("loss", "grad_norm", "mask_ratio_std", "mask_threshold"):
        assert [line[name] for line in metrics(run)] == [line[name] for line in metrics(finished_run)]
    assert_same_weights(finished_run, run)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_to_the_same_losses(finished_run: Path, tmp_path: Path, tiny_options: list[str]) -> None:
    run = tmp_path / "compiled"
    finish([*tiny_options, "train.max_steps=8", "train.compile=true"], run)
    expected = [line["loss"] for line in metrics(finished_run)]
    assert [line["loss"] for line in metrics(run)] == pytest.approx(expected, rel=1e-4)
    assert weights(run).keys() == weights(finished_run).keys()


@pytest.mark.slow
def test_resume_is_bit_exact(finished_run: Path, tmp_path: Path, tiny_options: list[str]) -> None:
    run = tmp_path / "resumed"
    shutil.copytree(finished_run, run)
    # as after a crash while the last checkpoint was being written: not complete, so it does not count
    (run / "checkpoints" / "step_00000008" / "COMPLETE.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss"')
    options = [*tiny_options, "train.max_steps=8", "train.save_every_steps=4"]
    printed = finish(options, run)
    assert "resuming from" in printed
    assert "step_00000004 at step 4" in printed
    assert_same_weights(finished_run, run)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(finished_run)]
    times = [line["wall_time_s"] for line in metrics(run)]
    assert times == sorted(times), "time is counted over all starts"
    # once finished, the same command is a no-op that says so
    assert "is finished" in finish(options, run)


@pytest.mark.slow
def test_other_launchers_give_the_same_losses(
    finished_run: Path, tmp_path: Path, launch: Callable, tiny_options: list[str], free_port: Callable
) -> None:
    options = [*tiny_options, "train.max_steps=2", "train.save_every_steps=4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run = tmp_path / "torchrun"
    schedule = "optimizer.final_lr_ratio=1.0"  # so that the length of the run does not matter for the first losses
    done = subprocess.run(
        [*torchrun, TRAIN, *options, schedule, f"train.output={run}"],
        cwd=ROOT,
        env={**os.environ, **RANK_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [line["loss"] for line in metrics(finished_run)[:2]]
    assert [line["loss"] for line in metrics(run)] == pytest.approx(expected, rel=1e-6)

    # what srun gives its tasks, twice the same process being one task each
    port, tasks = str(free_port()), []
    for rank in range(2):
        environment = {
            **os.environ,
            **RANK_ENVIRONMENT,
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, TRAIN, *options, schedule, f"train.output={tmp_path / 'srun'}"]
        tasks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    assert [task.wait(timeout=PATIENCE_S) for task in tasks] == [0, 0]
    assert [line["loss"] for line in metrics(tmp_path / "srun")] == pytest.approx(expected, rel=1e-6)

    plain = launch(TRAIN, *options, schedule, f"train.output={tmp_path / 'plain'}")
    assert plain.returncode == 0, plain.stderr[-3000:]
    assert "2 accumulation x 1 ranks" in plain.stdout


@pytest.mark.slow
def test_kill_and_terminate_lose_nothing(tmp_path: Path, tiny_options: list[str]) -> None:
    """SIGKILL in mid-run, then SIGTERM, then to the end: the weights of an undisturbed run."""
    options = [*tiny_options, "train.max_steps=60", "train.save_every_steps=10"]
    finish(options, tmp_path / "a", world_size=1)

    run = tmp_path / "b"
    assert start(options, run, 1, {"kill": [(23, 0)]}).wait() == [-signal.SIGKILL]
    assert start(options, run, 1, {"terminate": [(27, 0)]}).wait() == [75]  # "start me again"
    stopped = newest_checkpoint(run)
    assert stopped is not None
    assert int(stopped.name[5:]) == metrics(run)[-1]["step"] < 60

    finish(options, run, world_size=1)
    assert_same_weights(tmp_path / "a", run)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(tmp_path / "a")]


def test_wrong_inputs_are_one_line_and_exit_code_2(tmp_path: Path, tiny_options: list[str], finished_run: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = write_shards(tmp_path / "damaged", [96])
    shard = damaged / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    cases = {
        f"data.train={tmp_path / 'absent'}": "no shard directory at",
        f"data.train={empty}": "holds no *.tar",
        f"data.train={damaged}": "it changed since it was verified",
        "data.tokenizer=absent.model": "data-prep tokenizer",
        "train.global_batch_size=4000": "96 samples do not fill one global batch of 4,000",
        "train.global_batch_size=20": "not a multiple of micro_batch_size 8 x 1 ranks = 8: take 16",
        "train.output=": "give train.output=DIRECTORY",
        "train.deepspeed_config=zero9": "no DeepSpeed config 'zero9'",
        "masking.stategy=none": "did you mean 'masking.strategy'?",
        f"train.output={finished_run}": "was started with",
    }
    cases[f"--resume=never train.output={finished_run}"] = "holds a run, and train.resume=never"
    cases["--resume=runs/absent"] = "no run or checkpoint there"
    for option, expected in cases.items():
        arguments = [*tiny_options, f"train.output={tmp_path / 'run'}", *option.split()]
        program = start_program(train.main, arguments, 1, tmp_path / "output")
        assert program.wait() == [2], (option, program.output())
        errors = [line for line in program.output().splitlines() if line.startswith("error")]
        assert len(errors) == 1, (option, program.output())
        assert expected in errors[0]
        assert "Traceback" not in program.output()
