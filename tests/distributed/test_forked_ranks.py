"""The harness that other tests stand on: it must fail when a rank does."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks, start_program

from pipeline import train
from pipeline.ranks import Ranks


def total(ranks: Ranks, number: int) -> float:
    return float(ranks.mean(torch.tensor(float(number + ranks.rank))))


def fail_in_rank_1(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("of rank 1")
    ranks.barrier()


def wait_for_ever(arguments: Sequence[str]) -> int:
    signal.pause()
    return 0


def test_ranks_talk_to_each_other() -> None:
    assert run_ranks(total, 3, 5) == [6.0, 6.0, 6.0]


def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed:(.|\n)*of rank 1"):
        run_ranks(fail_in_rank_1, 2)


def test_programs_are_processes_with_exit_codes_and_output(tmp_path: Path) -> None:
    program = start_program(train.main, ["--recipe", "nonsense"], 1, tmp_path)
    assert program.wait() == [2]
    assert "error: no recipe 'nonsense'" in program.output()
    waiting = start_program(wait_for_ever, [], 2, tmp_path)
    waiting.send(signal.SIGKILL, ranks=[1])
    waiting.send(signal.SIGTERM, ranks=[0])
    assert waiting.wait() == [-signal.SIGTERM, -signal.SIGKILL]


@pytest.mark.slow
def test_a_whole_run_in_two_ranks(tiny_options: list[str], tmp_path: Path) -> None:
    options = [
        *tiny_options,
        "train.deepspeed_config=zero1_fp32",
        "train.max_steps=3",
        f"train.output={tmp_path / 'run'}",
    ]
    program = start_program(train.main, options, 2, tmp_path)
    assert program.wait() == [0, 0], program.output()
    assert "finished:" in program.output(0)
    assert "finished:" not in program.output(1)
