"""Saves that fail on one rank, and checkpoints that one rank does not see: all ranks do the same."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from forked_ranks import run_ranks
from small_checkpoints import save_small_checkpoint

from formats.errors import UserError
from model.clip import CLIP
from pipeline.data.captions import load_tokenizer
from pipeline.data.sample_order import BatchPlan
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.checkpoints.checkpoint import TrainingState, complete_checkpoints, list_checkpoints
from pipeline.training.checkpoints.checkpoint_writer import CheckpointWriter
from pipeline.training.checkpoints.resume import choose_checkpoint
from pipeline.training.engines.engine import make_engine
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.observing.run_logger import RunLogger
from pipeline.training.progress import Progress
from pipeline.training.stage_plan import plan_stages


@contextlib.contextmanager
def full_disk(is_full: bool, limit_bytes: int = 4096) -> Iterator[None]:
    """Files cannot get larger, as if there were no room; for root and everybody else."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_with_one_disk_full(ranks: Ranks, directory: Path, tokenizer_file: Path) -> list[str]:
    """The second rank's disk is full for a while; what each save said, and which checkpoints there were after it."""
    recipe = load_recipe("demo", ["model.name=ViT-test-8", "train.deepspeed_config=zero1_fp32"])
    tokenizer = load_tokenizer(str(tokenizer_file), 77)
    clip = CLIP(recipe.clip_config(tokenizer.encoder.vocab_size, tokenizer.encoder.end_token_id))
    config = deepspeed_config(recipe, BatchPlan(96, 16, 8, ranks.world_size), "zero1_fp32")
    engine = make_engine(clip, recipe, config, ranks)
    state = TrainingState(engine, recipe.masking)
    writer = CheckpointWriter(directory, recipe, tokenizer, ranks)
    story = []
    for step, is_full, must_succeed in [
        (1, False, False),
        (2, True, False),
        (3, True, False),
        (4, False, False),  # there is room again: the count begins anew
        (5, True, False),
        (6, True, False),
        (7, True, False),
        (8, True, True),
    ]:
        said = ""
        with full_disk(is_full and ranks.rank == 1):
            try:
                writer.save(state, Progress(step, step), must_succeed)
            except UserError as error:
                said = str(error)
        ranks.barrier()
        names = [path.name[-1] for path in list_checkpoints(directory)]
        assert list_checkpoints(directory) == complete_checkpoints(directory), "nothing half-written is left"
        story.append(f"{step}: {'/'.join(names)} {said}".strip())
        ranks.barrier()
    return story


def test_a_failed_save_costs_no_checkpoint_and_no_rank_waits(tmp_path: Path, tokenizer_file: Path) -> None:
    first, second = run_ranks(save_with_one_disk_full, 2, tmp_path, tokenizer_file)
    assert first == second
    assert first[:6] == ["1: 1", "2: 1", "3: 1", "4: 1/4", "5: 1/4", "6: 1/4"]
    for line in first[6:]:
        assert "could not be saved: " in line
        assert "File too large" in line
        assert line.endswith("(rank 1); earlier checkpoints are intact")
    assert first[6].startswith(f"7: 1/4 {tmp_path}/checkpoints/step_00000007")
    assert first[7].startswith(f"8: 1/4 {tmp_path}/checkpoints/step_00000008")


def log_with_a_full_disk(ranks: Ranks, directory: Path) -> None:
    """Files cannot grow between the second and the fourth line."""
    recipe = load_recipe("demo", ["model.name=ViT-test-8", "train.global_batch_size=64"])
    stages = plan_stages(recipe, 96, ranks.world_size, 300, 3)
    logger = RunLogger(directory, 0, stages, recipe.log)
    names = ("epoch", "loss", "lr", "samples_per_s", "tokens_per_s", "mask_ratio", "data_wait_share")
    figures = dict.fromkeys((*names, "seconds_per_step", "wall_time_s"), 1.0)
    for step in range(1, 6):
        limit = (directory / "metrics.jsonl").stat().st_size + 20 if step in (3, 4) else None
        with contextlib.redirect_stdout(io.StringIO()), full_disk(limit is not None, limit or 0):
            logger.log({"step": step, **figures})
    logger.close()


def test_lines_of_metrics_wait_for_room(tmp_path: Path) -> None:
    run_ranks(log_with_a_full_disk, 1, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def choose_from_two_disks(ranks: Ranks, directory: Path) -> str:
    """Each rank looks into a directory of its own, as nodes do that share nothing."""
    os.chdir(directory / str(ranks.rank))
    try:
        return str(choose_checkpoint(Path("run"), "auto", ranks))
    except UserError as error:
        return str(error)


def test_all_ranks_take_the_same_checkpoint_or_none(tmp_path: Path) -> None:
    for step in (1, 2):
        save_small_checkpoint(tmp_path / "0" / "run", step)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    last = Path("run/checkpoints/step_00000002")
    assert run_ranks(choose_from_two_disks, 2, tmp_path) == [str(last)] * 2
    shutil.rmtree(tmp_path / "1" / last)
    assert run_ranks(choose_from_two_disks, 2, tmp_path) == ["run/checkpoints/step_00000001"] * 2
    shutil.rmtree(tmp_path / "1" / "run")
    for said in run_ranks(choose_from_two_disks, 2, tmp_path):
        assert "is missing on rank 1, not on all: a run needs a directory that all nodes share" in said
