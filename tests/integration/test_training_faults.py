"""Training when something goes wrong, through its program: steps that are not finite, spikes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import write_shards
from faulty_train import start
from safetensors.torch import load_file


@pytest.fixture
def options(tiny_options: list[str]) -> list[str]:
    """Ten steps on two ranks, a checkpoint after every third."""
    return [
        *tiny_options,
        "train.deepspeed_config=zero1_bf16",
        "train.max_steps=10",
        "train.save_every_steps=3",
        "train.keep_checkpoints=9",
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_weights(run: Path, first_step: int, second_step: int, file: str = "model") -> bool:
    steps = (first_step, second_step)
    first, second = (load_file(run / f"checkpoints/step_{step:08d}/{file}.safetensors") for step in steps)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_skipped_step_is_counted_and_its_samples_named(tmp_path: Path, options: list[str]) -> None:
    program = start(options, tmp_path / "run", 2, {"nan": [(3, 1)]})
    assert program.wait() == [0, 0], program.output()
    run = tmp_path / "run"
    figures = lines(run / "metrics.jsonl")
    assert [line["skipped_steps"] for line in figures] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert [line["loss"] is None for line in figures] == [line["step"] == 4 for line in figures]
    assert all(line["mask_ratio"] == 0.5 for line in figures)
    assert "warning: step 4: the loss is nan, features are not finite, no rank applied the update" in program.output(0)
    (fault,) = lines(run / "faults_rank1.jsonl")
    assert fault["action"] == "go_on"
    assert len(fault["samples"]) == 1
    assert f"warning: rank 1: not finite in step 4: {fault['samples'][0]}" in program.output(1)
    assert lines(run / "faults_rank0.jsonl")[0]["samples"] == []


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path, options: list[str]) -> None:
    program = start([*options, "faults.max_skipped_steps=1"], tmp_path / "run", 2, {"nan": [(1, 0), (7, 1)]})
    assert program.wait() == [2, 2], program.output()
    assert "error: step 8: the loss is nan" in program.output(0)
    assert "2 such steps among 1000 (faults.max_skipped_steps)" in program.output(0)
    assert "Traceback" not in program.output(0) + program.output(1)
    assert not (tmp_path / "run/checkpoints/step_00000009").exists()


@pytest.mark.parametrize("template", ["zero1_bf16", "zero3_bf16"])
def test_rolling_back_takes_the_weights_of_the_last_checkpoint(
    template: str, tmp_path: Path, options: list[str]
) -> None:
    """Before the first checkpoint there is nothing to go back to; afterwards data and steps go on."""
    options = [*options, f"train.deepspeed_config={template}", "faults.on_non_finite=roll_back"]
    options.append("optimizer.ema_decay=0.5")
    program = start(options, tmp_path / "run", 2, {"nan": [(1, 0), (7, 1)]})
    assert program.wait() == [0, 0], program.output()
    run = tmp_path / "run"
    assert "no checkpoint of this stage to roll back to" in program.output(0)
    assert f"rolled back to the weights of {run / 'checkpoints/step_00000006'}" in program.output(0)
    for file in ("model", "model_ema"):
        assert same_weights(run, 6, 8, file), file
        assert not same_weights(run, 8, 9, file), file
    skipped = load_file(run / "checkpoints/step_00000008/faults.safetensors")["skipped_steps"]
    assert skipped.tolist() == [2, 8], "what counts faults goes on counting"
    figures = lines(run / "metrics.jsonl")
    assert [line["samples_seen"] for line in figures] == [16 * step for step in range(1, 11)]
    assert all(line["seconds_per_step"] > 0 and line["samples_per_s"] > 0 for line in figures)
    assert [line["save_s"] > 0 for line in figures] == [line["step"] in (4, 7, 9, 10) for line in figures]


def test_a_spike_is_said_and_may_stop_the_run(tmp_path: Path, options: list[str]) -> None:
    sensitive = [*options, "faults.spike_window_steps=16", "faults.spike_deviations=3", "faults.on_spike=stop"]
    program = start(sensitive, tmp_path / "run", 1, {"spike": [(7, 0)]})
    assert program.wait() == [2], program.output()
    assert "error: step 8: the loss is" in program.output(0)
    assert "(faults.spike_deviations)" in program.output(0)


def test_bad_samples_are_named_and_count_over_all_starts(tmp_path: Path, tiny_options: list[str]) -> None:
    """Eight of each pass over the data, in two ranks with loader processes; the second start goes on counting."""
    bad = {f"{number:08d}.jpg": b"<html>404</html>" for number in range(0, 96, 12)}
    data = write_shards(tmp_path / "shards", [48, 48], bad)
    options = [*tiny_options, f"data.train={data}", "data.workers=1", "train.max_steps=12", "train.save_every_steps=6"]
    program = start([*options, "data.max_bad_ratio=0.5"], tmp_path / "run", 2, {"kill": [(7, 0)]})
    assert program.wait() == [-signal.SIGKILL, 69], program.output(1)
    run = tmp_path / "run"
    named = "".join((run / f"bad_samples_rank{rank}.txt").read_text() for rank in range(2))
    assert all(name.removesuffix(".jpg") in named for name in bad)
    assert 1 <= program.output(1).count("warning: skipped") <= 5
    first = [line["bad_samples"] for line in lines(run / "metrics.jsonl")]
    assert first[5] >= 8

    again = start([*options, f"data.max_bad_ratio={(first[5] + 0.5) / 1000}"], tmp_path / "run", 2, {})
    assert again.wait() == [2, 2], again.output(0)
    stopped = re.search(r"error: (\d+) of \d+ samples could not be used, more than data.max_bad", again.output(0))
    assert stopped is not None, again.output(0)
    assert first[5] < int(stopped[1]) < first[5] + 8, "by itself the second start has no more than eight"
