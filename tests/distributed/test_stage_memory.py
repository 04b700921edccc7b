"""A stage leaves nothing behind: the next one's engine has the memory to itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_stage_gives_back_its_memory(
    stage: int, tmp_path: Path, launch: Callable, shards: Path, tokenizer_file: Path
) -> None:
    worker = Path(__file__).with_name("stage_memory_worker.py")
    batch = ["global_batch_size=16", "micro_batch_size=8"]
    options = [
        "model.name=ViT-test-8",
        f"data.train={shards}",
        f"data.tokenizer={tokenizer_file}",
        "data.workers=0",
        f"train.output={tmp_path / 'run'}",
        f"train.deepspeed_config=zero{stage}_bf16",
        *(f"{prefix}{option}" for prefix in ("train.", "stages.whole.train.") for option in batch),
        "stages.small.train.max_steps=2",  # in the second step ZeRO stage 3 knows the order of modules
    ]
    done = launch(worker, *options, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    # not line by line: two ranks write at once
    found = re.findall(r"(\d+) of (\d+) bytes outlive the stage", done.stdout)
    assert len(found) == 4  # two engines in turn, on two ranks
    for left, before in found:
        assert int(before) > 300_000
        assert int(left) == 0
