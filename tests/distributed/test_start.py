"""Weights to start from: read by the main rank alone, the same on all ranks; a refusal ends all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.files import sha256_of
from pipeline.training.checkpoints.checkpoint import WEIGHTS, newest_checkpoint
from pipeline.training.run_record import RECORD
from pipeline.training.weights.start_weights import RECORD_KEY

WORKER = Path(__file__).with_name("start_worker.py")
VARIANT = ["model.pool=attention", "model.activation=quick_gelu"]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, launch: Callable, tiny_options: list[str]) -> Path:
    """Two steps of one rank, with a probe for pooling."""
    run = tmp_path_factory.mktemp("runs") / "first"
    done = launch("pipeline/train.py", *tiny_options, *VARIANT, "train.max_steps=2", f"train.output={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.mark.slow
def test_all_ranks_have_the_weights_that_one_of_them_read(
    first_run: Path, tmp_path: Path, launch: Callable, tokenizer_file: Path
) -> None:
    checkpoint = newest_checkpoint(first_run)
    assert checkpoint is not None
    done = launch(WORKER, str(first_run), str(tokenizer_file), str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    weights, sha256 = load_file(checkpoint / WEIGHTS), sha256_of(checkpoint / WEIGHTS)
    for rank in range(2):
        found = load_file(tmp_path / f"{sha256}_{rank}.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)

    refused = launch(WORKER, str(tmp_path / "absent"), str(tokenizer_file), str(tmp_path), ranks=2)
    assert refused.returncode == 2
    assert f"error: no weights at {tmp_path / 'absent'}" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_run_starts_from_another_at_a_larger_image_size(
    first_run: Path, tmp_path: Path, launch: Callable, tiny_options: list[str]
) -> None:
    run, template = tmp_path / "second", tmp_path / "zero3.json"
    template.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    options = [*tiny_options, *VARIANT, "model.image_size=64", "optimizer.lr=1e-30", "train.max_steps=1"]
    options += [f"--deepspeed_config={template}", f"train.output={run}"]
    done = launch("pipeline/train.py", *options, f"model.start_from={first_run}", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = newest_checkpoint(first_run), newest_checkpoint(run)
    assert before is not None
    assert after is not None
    assert f"starting from {before / WEIGHTS}" in done.stdout
    assert json.loads((run / RECORD).read_text())[RECORD_KEY] == sha256_of(before / WEIGHTS)
    old, new = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    assert old.keys() == new.keys()
    for name in old.keys() - {"visual.positional_embedding"}:
        assert torch.equal(old[name], new[name]), name
    assert new["visual.positional_embedding"].shape == (65, 32)

    other = launch("pipeline/train.py", *options, "model.start_from=")
    assert other.returncode == 2
    assert "was started from weights with sha256" in other.stderr
