"""Two jobs and one run directory: the second is told who the first is, and the first is not disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from forked_ranks import start_program

from formats.owners import OWNER
from pipeline import train


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_second_job_leaves_the_first_alone_and_follows_it_when_it_was_killed(
    tiny_options: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [*tiny_options, "train.max_steps=100000", "train.save_every_steps=2", f"train.output={run}"]
    first = start_program(train.main, options, 2, tmp_path / "first")
    first.wait_for("step_00000002 in")  # saved
    recipe = (run / "recipe.yaml").read_bytes()
    second = start_program(train.main, [*options, "optimizer.lr=0.01"], 2, tmp_path / "second")
    assert second.wait() == [2, 2]
    for rank, name in enumerate(["error: ", "error (rank 1): "]):
        said = [line for line in second.output(rank).splitlines() if line.startswith("error")]
        (line,) = said
        assert line.startswith(f"{name}{run} is being trained by process {first.processes[0].pid} on ")
    assert (run / "recipe.yaml").read_bytes() == recipe

    steps = len(lines(run))
    first.wait_for(f"step_{steps + steps % 2 + 2:08d} in")  # it goes on
    first.send(signal.SIGKILL)
    first.wait()
    assert [line["step"] for line in lines(run)] == list(range(1, len(lines(run)) + 1))  # of one run only
    assert (run / OWNER).exists()

    third = start_program(train.main, options, 2, tmp_path / "third")
    third.wait_for("resuming from")
    third.wait_for("\nsaved ")  # by now it listens to signals
    third.send(signal.SIGTERM)
    assert third.wait() == [75, 75], third.output(0)
    assert [line["step"] for line in lines(run)] == list(range(1, len(lines(run)) + 1))
    assert not (run / OWNER).exists()
