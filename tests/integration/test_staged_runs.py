"""Runs of several stages through the command line: what each computes, and resuming anywhere."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faulty_train import start
from safetensors.torch import load_file

from data_prep.editions import write_edition
from formats.balance import write_balance
from formats.concepts import Concept, write_concepts
from formats.manifest import read_manifest
from pipeline.inference import load_for_inference
from pipeline.training.checkpoints.checkpoint import newest_checkpoint

POSITIONS = "visual.positional_embedding"

# The first stage looks through a moving average of the model, the second at its patch embeddings.
LOOKING = """
base: tiny_staged
model: {image_size: 32}
masking: {strategy: attentive, ema_decay: 0.5, ratio_schedule: cosine, final_mask_ratio: 0.25}
stages:
  - name: look
    train: {max_steps: 14}
  - name: mix
    masking: {strategy: cluster, embedding_mix: 0.5, ratio_schedule: constant, final_mask_ratio: null}
    train: {max_steps: 14}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def staged_options(shards: Path, tokenizer_file: Path) -> list[str]:
    """`tiny_staged` in seconds: 12 steps of 16 small images, then 18 of 8 whole ones."""
    return [
        "--recipe=tiny_staged",
        "model.name=ViT-test-8",
        f"data.train={shards}",
        f"data.tokenizer={tokenizer_file}",
        "data.workers=0",
        "optimizer.warmup_steps=2",
        "train.log_every_steps=1",
        "train.save_every_steps=4",
        "train.global_batch_size=16",
        "train.micro_batch_size=8",
        "stages.small.model.image_size=16",
        "stages.small.train.max_steps=12",
        "stages.whole.train.epochs=1.5",
        "stages.whole.train.global_batch_size=8",
        "stages.whole.train.micro_batch_size=4",
        "stages.whole.optimizer.warmup_steps=1",
    ]


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    assert_same_weights(first, second)


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def interrupt(options: Sequence[str], run: Path, kind: str, step: int) -> int:
    """Start or continue a run that is killed, or told to terminate, when so many steps are done; its exit code."""
    (code,) = start(options, run, 1, {kind: [(step, 0)]}).wait()
    return code


def finish(options: Sequence[str], run: Path, world_size: int = 1) -> str:
    """Start or continue a run, to its end; returns what it prints."""
    program = start(options, run, world_size, {})
    assert program.wait() == [0] * world_size, program.outputs()
    return program.output()


@pytest.mark.parametrize("stage", [1, 3])
def test_stages_on_two_ranks(stage: int, tmp_path: Path, staged_options: list[str]) -> None:
    """One command, one run: each stage with its images, masks, batch and schedule; and resumed in the second.

    Concepts are predicted in both, more of them from the ninth step on.
    """
    concepts = [Concept("dog", 1, 32, 2), Concept("cat", 1, 32, 1), Concept("a bird", 2, 32, 1)]
    write_concepts(tmp_path / "concepts.jsonl", concepts, 96, {})
    options = [*staged_options, f"train.deepspeed_config=zero{stage}_bf16", "concepts.objective=predict"]
    options += [f"concepts.file={tmp_path / 'concepts.jsonl'}", "concepts.boundaries=[128]", "concepts.weight=0.5"]
    printed = finish(options, tmp_path / "run", world_size=2)
    plan = printed[: printed.index("step ")]
    assert "stage 1 of 2, small: steps 1 to 12" in plan
    assert "stage 2 of 2, whole: steps 13 to 30" in plan

    lines = metrics(tmp_path / "run")
    small, whole = lines[:12], lines[12:]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [{line["stage"] for line in stage} for stage in (small, whole)] == [{"small"}, {"whole"}]
    assert [line["samples_seen"] for line in lines] == [16 * n for n in range(1, 13)] + [
        192 + 8 * n for n in range(1, 19)
    ]
    passes = [n / 6 for n in range(1, 13)] + [2 + n / 12 for n in range(1, 19)]
    assert [line["epoch"] for line in lines] == pytest.approx(passes)
    assert [{line["mask_ratio"] for line in stage} for stage in (small, whole)] == [{0.5}, {0.0}]
    assert {line["image_tokens"] for line in small} == {8 * (4 / 2 + 1)}
    assert {line["image_tokens"] for line in whole} == {4 * (16 + 1)}
    assert small[11]["lr"] < small[1]["lr"] == 1e-3
    assert whole[0]["lr"] == 1e-4  # a warm-up of its own, of one step
    assert whole[16]["lr"] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 15 / 16)) / 2)
    assert whole[17]["lr"] == 0
    assert [line["concept_stage"] for line in lines] == [1] * 8 + [2] * 22
    # a third of the captions names none of the two concepts of the first stage, of which one is guessed
    assert all(0 < line["concept_loss"] < math.log(2) + 0.1 for line in small[:8])
    assert all(math.log(2) < line["concept_loss"] < 2 for line in small[8:])
    head = {name: value for name, value in weights(tmp_path / "run").items() if name.startswith("heads.")}
    assert {name: tuple(value.shape) for name, value in head.items()} == {
        "heads.concepts.weight": (3, 32),
        "heads.concepts.bias": (3,),
    }
    assert len(load_for_inference(str(tmp_path / "run"), torch.device("cpu")).clip.heads) == 0

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000030")
    assert "step_00000028 at step 28" in finish(options, tmp_path / "again", world_size=2)
    assert_same_run(tmp_path / "run", tmp_path / "again")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, staged_options: list[str]) -> Path:
    """The staged run, with all of its checkpoints."""
    run = tmp_path_factory.mktemp("staged") / "run"
    finish([*staged_options, "train.keep_checkpoints=9"], run)
    return run


def test_a_finished_stage_is_never_redone(
    undisturbed: Path, tmp_path: Path, shards: Path, staged_options: list[str]
) -> None:
    """SIGKILL between stages and in both, SIGTERM in the second, with one checkpoint kept: the same bits.

    Each time it goes on with another edition of the data, whose pictures are small enough already to be the same.
    """
    edition = tmp_path / "edition"
    write_edition(shards, edition, 64, 90, 1)
    in_stage, in_all = [f"stages.small.data.train={edition}"], [f"data.train={edition}"]
    run, options = (
        tmp_path / "run",
        [*staged_options, "train.keep_checkpoints=1", "stages.whole.train.save_every_steps=20"],
    )
    assert interrupt(options, run, "kill", 5) == -signal.SIGKILL
    assert interrupt([*options, *in_stage], run, "kill", 12) == -signal.SIGKILL
    assert [line["stage"] for line in metrics(run)] == ["small"] * 12
    first_stage = metrics(run)

    # killed in the second stage before that has a checkpoint: the last one of the first is still there
    assert interrupt(options, run, "kill", 14) == -signal.SIGKILL
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000012"]
    assert interrupt([*options, *in_all], run, "terminate", 15) == 75
    stopped = newest_checkpoint(run)
    assert stopped is not None
    assert 15 <= int(stopped.name.removeprefix("step_")) < 30
    assert json.loads((stopped / "COMPLETE.json").read_text())["stage"] == "whole"
    printed = finish(options, run)
    assert "small  step" not in printed
    assert metrics(run)[:12] == first_stage, "not even logged again"
    assert_same_run(undisturbed, run)
    assert "is finished: 30 of 30 steps" in finish(options, run)


def test_balanced_stages_go_on_where_they_were(tmp_path: Path, shards: Path, staged_options: list[str]) -> None:
    """Each draws by a balance of its own; stopped in the second, the same bits; another balance is refused.

    Of captions words are kept by their concepts.
    """
    write_concepts(tmp_path / "concepts.jsonl", [Concept("dog", 1, 32, 2), Concept("picture", 2, 96, 2)], 96, {})
    manifest = read_manifest(shards)
    for name, of_shards in (("thinned", (0.4, 0.6, 1.0)), ("repeated", (0.3, 1.0, 1.8))):
        rates = [np.full(s.samples, rate) for s, rate in zip(manifest.shards, of_shards, strict=True)]
        write_balance(tmp_path / name, manifest, rates, {})
    options = [
        *staged_options,
        "data.draw=bernoulli",
        "text_masking.max_tokens=7",
        "concepts.objective=keep",
        f"concepts.file={tmp_path / 'concepts.jsonl'}",
        "concepts.boundaries=[100]",
        f"stages.small.data.balance={tmp_path / 'thinned'}",
        f"stages.whole.data.balance={tmp_path / 'repeated'}",
        "stages.whole.data.draw=rotation",
    ]
    printed = finish(options, tmp_path / "run")
    assert f"({tmp_path / 'thinned'})" in printed
    assert "coverage of the run:" in printed
    assert "tail (rates up to 1.8)" in printed
    assert "head (rates up to 0.4)" in printed, "after an epoch of the first stage"
    assert interrupt(options, tmp_path / "again", "terminate", 18) == 75
    finish(options, tmp_path / "again")
    assert_same_run(tmp_path / "run", tmp_path / "again")
    refused = start([*options, f"stages.whole.data.balance={tmp_path / 'thinned'}"], tmp_path / "again", 1, {})
    assert refused.wait() == [2]
    assert "another data.balance" in refused.output()


def test_a_stop_waits_for_no_line(undisturbed: Path, tmp_path: Path, staged_options: list[str]) -> None:
    """Asked to stop long before the only line that the first stage logs, its last."""
    run, options = tmp_path / "run", [*staged_options, "stages.small.train.log_every_steps=12"]
    assert interrupt(options, run, "terminate", 4) == 75
    stopped = newest_checkpoint(run)
    assert stopped is not None
    assert stopped.name < "step_00000012"
    assert (run / "checkpoints" / "latest").read_text() == f"{stopped.name}\n"
    finish(options, run)
    assert losses(run)[-18:] == losses(undisturbed)[12:]
    assert_same_weights(undisturbed, run)


def test_evaluation_and_report_take_the_last_stage(
    undisturbed: Path, tmp_path: Path, launch: Callable, shards: Path
) -> None:
    model = load_for_inference(str(undisturbed), torch.device("cpu"))
    assert (model.image_size, model.step, model.samples_seen, model.masking.strategy) == (32, 30, 336, "none")
    first = load_for_inference(str(undisturbed / "checkpoints" / "step_00000012"), torch.device("cpu"))
    assert (first.image_size, first.step, first.masking.strategy) == (16, 12, "cluster")
    assert first.clip.encode_image(torch.rand(2, 3, 16, 16)).shape == (2, 32)

    made = launch("pipeline/report.py", str(undisturbed), "--images", str(shards), "--output", str(tmp_path / "report"))
    assert made.returncode == 0, made.stderr[-3000:]
    table = (tmp_path / "report" / "report.md").read_text()
    assert "cluster, 50%; none" in table
    assert "16; 8 pairs" in table


def test_a_stage_begins_where_the_last_one_ended(undisturbed: Path, tmp_path: Path, staged_options: list[str]) -> None:
    """The first stage is a run of its own; the second, with no learning rate to speak of, changes only the grid."""
    alone = [option for option in staged_options if not option.startswith(("stages.", "--recipe"))]
    (tmp_path / "alone.yaml").write_text("base: tiny_staged\nstages: []\n")
    alone += ["--recipe", str(tmp_path / "alone.yaml"), "model.image_size=16", "train.max_steps=12"]
    finish(alone, tmp_path / "alone")
    assert losses(tmp_path / "alone") == losses(undisturbed)[:12]

    finish([*staged_options, "stages.whole.optimizer.lr=1e-30"], tmp_path / "still")
    before, after = weights(tmp_path / "alone"), weights(tmp_path / "still")
    old, new = before.pop(POSITIONS), after.pop(POSITIONS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    grid = F.interpolate(old[1:].T.view(1, -1, 2, 2), (4, 4), mode="bicubic", antialias=True).view(-1, 16).T
    torch.testing.assert_close(new, torch.cat((old[:1], grid)))


def test_what_masks_look_at_survives_a_kill(tmp_path: Path, staged_options: list[str]) -> None:
    """`attentive` looks through a moving average and `embedding_mix` at the weights: the same bits after SIGKILL."""
    recipe = tmp_path / "looking.yaml"
    recipe.write_text(LOOKING)
    options = [option for option in staged_options if not option.startswith(("stages.", "--recipe"))]
    options += ["--recipe", str(recipe), "train.save_every_steps=6", "optimizer.lr=1e-2"]
    finish(options, tmp_path / "a")
    lines = metrics(tmp_path / "a")
    targets = [0.5 - 0.25 * (1 - math.cos(math.pi * step / 13)) / 2 for step in range(14)] + [0.5] * 14
    kept = [round((1 - target) * 8 * 16) for target in targets]  # exactly, of a micro-batch
    assert [line["image_tokens"] for line in lines] == [count + 8 for count in kept]

    run = tmp_path / "b"
    assert interrupt(options, run, "kill", 7) == -signal.SIGKILL
    assert (run / "checkpoints" / "step_00000006" / "attentive_copy.safetensors").exists()
    assert interrupt(options, run, "kill", 21) == -signal.SIGKILL
    newest = newest_checkpoint(run)
    assert newest is not None
    assert not (newest / "attentive_copy.safetensors").exists()
    finish(options, run)
    assert_same_run(tmp_path / "a", run)
    assert [line["mask_ratio_std"] for line in metrics(run)] == [line["mask_ratio_std"] for line in lines]
