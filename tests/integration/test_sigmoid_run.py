"""A run with SigLIP's loss, in a ring and with cached gradients, from its recipe to a model that encodes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from forked_ranks import start_program
from safetensors.torch import load_file

from pipeline import train
from pipeline.inference import load_for_inference
from pipeline.training.checkpoints.checkpoint import newest_checkpoint


def test_a_run_with_the_sigmoid_loss(tmp_path: Path, tiny_options: list[str]) -> None:
    run = tmp_path / "run"
    loss = ["loss.kind=sigmoid", "loss.exchange=ring", "loss.cache_gradients=true", "train.micro_batch_size=4"]
    options = ["train.max_steps=2", "optimizer.warmup_steps=0", f"train.output={run}"]
    program = start_program(train.main, [*tiny_options, *loss, *options], 2, tmp_path / "output")
    assert program.wait() == [0, 0], program.output(0)
    assert "4 micro x 2 accumulation x 2 ranks; each pair meets 15 negatives" in program.output(0)

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    # SigLIP's start: nearly all pairs are negatives, and are taken for such; the 16 positives cost about 10 each
    assert lines[0]["loss"] == pytest.approx(10, abs=3)
    assert lines[0]["logit_scale"] == pytest.approx(10, rel=1e-2)
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    bias = load_file(checkpoint / "model.safetensors")["logit_bias"]
    assert bias.shape == (1,)
    assert bias.item() != -10
    model = load_for_inference(str(run), torch.device("cpu"))
    assert (model.clip.config.init_logit_bias, model.clip.config.init_logit_scale) == (-10, math.log(10))
