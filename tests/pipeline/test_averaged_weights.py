"""Averaged weights of a checkpoint stand wherever a run may stand, and are told apart from the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_runs import save_run

from formats.errors import UserError
from formats.files import sha256_of
from pipeline.data.captions import load_tokenizer
from pipeline.evaluation.results import Result
from pipeline.inference import InferenceModel, load_any_model
from pipeline.reporting.inputs import name_checkpoints
from pipeline.training.checkpoints.checkpoint import (
    AVERAGED_WEIGHTS,
    WEIGHTS,
    FileRecord,
    newest_checkpoint,
    read_contents,
)
from pipeline.training.checkpoints.checkpoint_writer import publish

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, tokenizer_file: Path) -> Path:
    """One checkpoint, of which the average is everywhere 1 more than the weights."""
    run = save_run(tmp_path / "first", load_tokenizer(str(tokenizer_file), 77))
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    average = checkpoint / AVERAGED_WEIGHTS
    save_file({name: value + 1 for name, value in load_file(checkpoint / WEIGHTS).items()}, average)
    contents = read_contents(checkpoint)
    contents.files[average.name] = FileRecord(average.stat().st_size, sha256_of(average))
    publish(checkpoint, contents)
    return run


def label(model: InferenceModel) -> str:
    result = Result(model.name, model.checkpoint, "flickr8k", "retrieval", {}, samples=1)
    (checkpoint,) = name_checkpoints([(result, Path("results.jsonl"))], runs=())[1]
    return checkpoint.label


def test_a_run_or_a_checkpoint_with_the_file_behind_it_is_the_average(run: Path) -> None:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    plain, *averaged = (
        load_any_model(str(path), CPU) for path in (run, run / AVERAGED_WEIGHTS, checkpoint / AVERAGED_WEIGHTS)
    )
    assert plain.checkpoint == str(checkpoint)
    assert plain.weights_sha256 == sha256_of(checkpoint / WEIGHTS)
    for model in averaged:
        assert torch.equal(model.clip.visual.proj, plain.clip.visual.proj + 1)
        assert model.checkpoint == str(checkpoint / AVERAGED_WEIGHTS)
        assert model.weights_sha256 == sha256_of(checkpoint / AVERAGED_WEIGHTS)
    assert [label(plain), label(averaged[0])] == ["first", "first, averaged weights"]


def test_a_run_without_an_average_says_so(tmp_path: Path, tokenizer_file: Path) -> None:
    run = save_run(tmp_path / "other", load_tokenizer(str(tokenizer_file), 77))
    with pytest.raises(UserError, match=r"has no model_ema.safetensors: it was trained without optimizer.ema_decay"):
        load_any_model(str(run / AVERAGED_WEIGHTS), CPU)
    with pytest.raises(UserError, match="no run or checkpoint at"):
        load_any_model(str(tmp_path / "absent" / AVERAGED_WEIGHTS), CPU)
