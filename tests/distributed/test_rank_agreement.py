"""What ranks find out about each other."""

from __future__ import annotations

import pytest
import torch
from forked_ranks import run_ranks
from torch import nn

from formats.errors import UserError
from pipeline.ranks import Ranks
from pipeline.training.faults.agreement import RankCheck, StepVote, bit_sums, check_same_start


def vote(ranks: Ranks) -> tuple[list[bool], str]:
    """Rank 2 wants to stop at step 3; then rank 1 is a step behind."""
    votes = StepVote(ranks)
    answers = [votes.cast(step, 10 * step, stop=ranks.rank == 2 and step >= 3) for step in range(1, 6)]
    votes.cast(6 - (ranks.rank == 1), 60, stop=False)
    try:
        votes.cast(7, 70, stop=False)
    except UserError as error:
        return answers, str(error)
    finally:
        votes.close()
    return answers, ""


def test_all_ranks_learn_of_a_stop_one_step_later() -> None:
    for answers, problem in run_ranks(vote, 3):
        assert answers == [False, False, False, True, True]
        assert "ranks have run apart: they stand at steps 5 to 6" in problem


def start_with(ranks: Ranks, everyones_options: list[str]) -> str:
    try:
        check_same_start({"data": "abc", "options": everyones_options[ranks.rank]}, ranks)
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_were_started_with_other_options_refuse() -> None:
    assert run_ranks(start_with, 2, ["lr: 1\nseed: 0", "lr: 1\nseed: 0"]) == ["", ""]
    problem = "rank 2 differs from rank 0 in options: give all nodes the same (rank 0: seed: 0; rank 2: seed: 1)"
    assert run_ranks(start_with, 3, [*["lr: 1\nseed: 0"] * 2, "lr: 1\nseed: 1\nx: 2"]) == [problem] * 3


def compare_weights(ranks: Ranks) -> list[str]:
    """After each of: nothing, one flipped bit on the last rank, the same mended."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2).bfloat16())
    check = RankCheck(module, every_steps=10, ranks=ranks)
    found = []
    for step, change in [(10, 0), (20, 1), (25, 0), (30, -1)]:
        if ranks.rank == ranks.world_size - 1:
            module[1].weight.data.view(torch.int16)[0, 0] += change
        try:
            check.compare(step)
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(("world_size", "who"), [(2, "on ranks 0 and 1"), (3, "on rank 2;")])
def test_a_flipped_bit_is_found_and_its_rank_named(world_size: int, who: str) -> None:
    for first, second, third, fourth in run_ranks(compare_weights, world_size):
        assert (first, third, fourth) == ("", "", "")  # the third is not due
        assert second.startswith("step 20: weights are no longer the same on all ranks: 1.weight on ")
        assert who in second


def test_sums_are_of_bits() -> None:
    """NaN and infinity compare like any other value, and so does the sign of zero."""
    module = nn.Linear(2, 1, bias=False)
    sums = set()
    for value in (float("nan"), float("inf"), 0.0, -0.0, 1.0):
        nn.init.constant_(module.weight, value)
        sums.add(int(bit_sums(module)))
    assert len(sums) == 5
