"""One rank of a world that is not there, as `train.py --simulate-world` runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_shards
from forked_ranks import start_program

from formats.errors import UserError
from pipeline import train

WORLD, RANK, SAMPLES = 1024, 777, 1_100
Simulate = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Simulate:
    """Exit code and output of a simulation in a fresh process."""
    directory = tmp_path_factory.mktemp("simulation")
    shards = write_shards(directory / "shards", [400, 400, 300])

    def run(world_size: int, rank: int, zero_stage: int, *options: str) -> tuple[int, str]:
        config = directory / f"zero{zero_stage}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": zero_stage, "reduce_bucket_size": 10_000}}))
        arguments = ["--recipe", "demo", "model.name=ViT-test-8", f"data.train={shards}", *options]
        arguments += [f"data.tokenizer={tokenizer_file}", f"train.output={directory / 'run'}", "train.epochs=3"]
        arguments += ["--simulate-world", str(world_size), "--simulate-rank", str(rank)]
        program = start_program(
            train.main, [*arguments, "--deepspeed_config", str(config)], 1, directory / f"{world_size}_{zero_stage}"
        )
        [code] = program.wait()
        assert not (directory / "run").exists()
        return code, program.output()

    return run


def megabytes(pattern: str, output: str) -> float:
    found = re.search(pattern + r" ([\d,.]+) MB", output)
    assert found, output
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize(("world_size", "rank", "zero_stage"), [(WORLD, RANK, 1), (64, 63, 3)])
def test_a_rank_of_many_is_simulated(simulate: Simulate, world_size: int, rank: int, zero_stage: int) -> None:
    sizes = ["train.micro_batch_size=1", f"train.global_batch_size={world_size}"]
    code, output = simulate(world_size, rank, zero_stage, *sizes)
    assert code == 0, output
    last_step = -(-3 * SAMPLES // world_size)
    last = (last_step - 1) * world_size + rank
    assert f"first step 1: samples {rank:,} to {rank:,} of the stream, epoch 0" in output
    assert f"last step {last_step:,}: samples {last:,} to {last:,} of the stream, epoch {last // SAMPLES}" in output
    assert "losses mean nothing" in output
    measured, estimated = megabytes("at most", output), megabytes("estimated for 1 pairs:", output)
    assert measured == pytest.approx(estimated, rel=0.15, abs=0.2)
    # both features of every rank come to this one, whatever the size of the world
    assert megabytes("all_gather", output) >= world_size * 32 * 4 / 1e6


def test_part_of_a_micro_batch_is_computed(simulate: Simulate) -> None:
    sizes = ["train.micro_batch_size=100", "train.global_batch_size=800", "--simulate-pairs", "3"]
    code, output = simulate(4, 2, 2, *sizes)
    assert code == 0, output
    assert "samples 200 to 299, 600 to 699 of the stream, epoch 0" in output
    assert "read: 400 pairs" in output
    assert "a step of 3 pairs took" in output


def test_what_a_real_world_would_refuse_is_refused(simulate: Simulate) -> None:
    code, output = simulate(WORLD, RANK, 1, "train.micro_batch_size=2", f"train.global_batch_size={2 * WORLD}")
    assert code == 2
    assert "1,100 samples do not fill one global batch of 2,048 (1024 ranks x 2 each)" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate-world", "8", "--simulate-rank", "8"], "no rank 8 among 8"),
        (["--simulate-world", "0"], "no rank 0 among 0"),
    ],
)
def test_there_is_no_such_rank(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.main(["--recipe", "demo", *options])
