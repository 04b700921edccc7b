"""One run on 4, then 2, then 3 ranks: each sample of an epoch once, its length, a learning rate without a jump."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import write_shards
from forked_ranks import run_ranks

from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training import stage_data
from pipeline.training.training_run import EXIT_INTERRUPTED, TrainingRun


def train(ranks: Ranks, options: Sequence[str], stop_after: int | None) -> tuple[int, list[list[str]], str]:
    """Train until so many micro-batches are read, or to the end.

    Returns the exit code, the keys of each micro-batch of this rank, and what it printed.
    """
    read: list[list[str]] = []
    make_loader = stage_data.make_loader

    def recorded(*arguments: object) -> Iterator[Batch]:
        for batch in make_loader(*arguments):  # type: ignore[arg-type]
            read.append(batch.keys)
            if len(read) == stop_after and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    printed = io.StringIO()
    with patch.object(stage_data, "make_loader", recorded), contextlib.redirect_stdout(printed):
        code = TrainingRun(load_recipe("demo", options), ranks).run()
    return code, read, printed.getvalue()


@pytest.mark.slow
def test_from_4_to_2_to_3_ranks(shards: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    """Two epochs of 108 samples of two sets, in batches of 16, 12 and 9."""
    other = write_shards(tmp_path / "other", [7, 5])
    options = [
        "model.name=ViT-test-8",
        f"data.train=[{{path: {shards}}}, {{path: {other}}}]",
        f"data.tokenizer={tokenizer_file}",
        f"train.output={tmp_path / 'run'}",
        "data.workers=0",
        "train.log_every_steps=1",
        "train.epochs=2",
        "optimizer.warmup_steps=3",
    ]
    keys: list[str] = []
    expected_seen: list[int] = []
    for ranks, micro, accumulation, stop_after in [(4, 4, 1, 1), (2, 3, 2, 3), (3, 3, 1, None)]:
        batch_size = ranks * micro * accumulation
        batch = [f"train.global_batch_size={batch_size}", f"train.micro_batch_size={micro}"]
        codes, of_ranks, printed = zip(*run_ranks(train, ranks, [*options, *batch], stop_after), strict=True)
        assert set(codes) == {EXIT_INTERRUPTED if stop_after else 0}
        read = [key for micro_batches in zip(*of_ranks, strict=True) for of_rank in micro_batches for key in of_rank]
        metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = len(metrics) - len(expected_seen)
        expected_seen += range(len(keys) + batch_size, len(keys) + steps * batch_size + 1, batch_size)
        assert steps > 1
        keys += read[: steps * batch_size]  # what was fetched ahead of a stop was not trained on

    for epoch in (keys[:108], keys[108:216]):
        assert len(set(epoch)) == 108
    assert keys[:108] != keys[108:216]
    assert [line["samples_seen"] for line in metrics] == expected_seen
    assert 216 <= len(keys) < 216 + 9, "whole batches, the last completes the epoch"
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    by_set = Counter(str(Path(key.partition(": ")[0]).parent) for key in keys)
    assert metrics[-1]["samples_seen_by_set"] == {str(shards): by_set[str(shards)], str(other): by_set[str(other)]}
    # warm-up of 3 steps and a cosine that ends with the 14th, in steps of the first batch
    expected = []
    for seen in [0, *(line["samples_seen"] for line in metrics[:-1])]:
        done = min(1.0, max(0, seen / 16 - 3) / 10)
        warm_up, decay = (seen / 16 + 1) / 3, 0.5 * (1 + math.cos(math.pi * done))
        expected.append(1e-3 * (min(1, warm_up) if seen < 3 * 16 else decay))
    assert [line["lr"] for line in metrics] == pytest.approx(expected)

    assert "batch: 9 = 3 micro x 1 accumulation x 3 ranks; each pair meets 8 negatives; 16 pairs when" in printed[0]
    assert "coverage of epoch 1: 108 seen, 108 of 108 unique, 0 repeated\n" in printed[0]
    assert f"coverage of the run: {len(keys)} seen, 108 of 108 unique, {len(keys) - 108} repeated\n" in printed[0]
    assert "coverage" not in printed[1]
