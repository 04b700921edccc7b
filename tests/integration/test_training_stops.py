"""How a run ends before its time: asked to, by the loss of a rank, by standing still."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from faulty_train import start
from waiting import PATIENCE_S, wait_for

from pipeline.training.checkpoints.checkpoint import newest_checkpoint


@pytest.fixture
def options(tiny_options: list[str]) -> list[str]:
    """More steps than a test waits for; nothing is logged or saved unless it stops."""
    return [
        *tiny_options,
        "train.deepspeed_config=zero1_fp32",
        "train.max_steps=100000",
        "train.log_every_steps=100000",
        "train.save_every_steps=100000",
    ]


def test_a_signal_to_one_rank_stops_all_at_once_and_saves(tmp_path: Path, options: list[str]) -> None:
    """Long before the next line of metrics; further signals to all of them, while they save too, change nothing."""
    run = tmp_path / "run"
    program = start(options, tmp_path / "run", 2, {})
    wait_for((run / "stacks_rank1.txt").exists, "ranks that listen", program.outputs)
    time.sleep(1)
    program.send(signal.SIGTERM, ranks=[1])
    program.wait_for("SIGTERM: all ranks stop", rank=1)
    while program.processes[0].exitcode is None:
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            program.send(number)
        time.sleep(0.01)
    assert program.wait() == [75, 75], program.output(0)
    assert "as asked; the same command continues from there" in program.output(0)
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    (logged,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert checkpoint.name == f"step_{logged['step']:08d}"


def test_the_death_of_a_rank_ends_the_others_with_a_line(tmp_path: Path, options: list[str]) -> None:
    program = start(options, tmp_path / "run", 2, {"kill": [(5, 1)]})
    assert program.wait() == [69, -signal.SIGKILL], program.output(0)
    assert "error: another rank ended or cannot be reached" in program.output(0)
    assert "Traceback" not in program.output(0)


def test_weights_that_differ_between_ranks_stop_the_run(tmp_path: Path, options: list[str]) -> None:
    often = [*options, "train.log_every_steps=4", "faults.compare_ranks_every_steps=4"]
    program = start(often, tmp_path / "run", 2, {"flip": [(7, 1)]})
    assert program.wait() == [2, 2], program.output(0)
    assert "error: step 8: weights are no longer the same on all ranks: logit_scale on ranks 0 and 1" in program.output(
        0
    )


def test_ranks_that_stand_still_end_the_run_and_leave_stacks(tmp_path: Path, options: list[str]) -> None:
    """Rank 1 is stopped whole; a loader process of rank 2 hangs; rank 0 waits for both."""
    slow = [*options, "faults.hang_timeout_s=4", "data.workers=1", "train.global_batch_size=24"]
    program = start(slow, tmp_path / "run", 3, {"freeze": [(5, 1)], "slow_worker": [(5, 2)]})
    for rank in (0, 2):
        program.processes[rank].join(PATIENCE_S)
    program.send(signal.SIGKILL, ranks=[1])
    assert program.wait() == [70, -signal.SIGKILL, 70], program.output(0)
    ended = program.output(0)
    assert "no step within 4 s" in ended or "another rank stands still" in ended
    assert "in train_step" in ended, "stacks are on the terminal too"
    stacks = [(tmp_path / "run" / f"stacks_rank{rank}.txt").read_text() for rank in range(3)]
    assert "in train_step" in stacks[0]
    assert "in _next_batches" in stacks[2]
    assert "in slow" in stacks[2].partition("loader process")[2]
