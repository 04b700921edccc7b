"""Which checkpoint a run goes on from, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoints import save_small_checkpoint

from formats.errors import UserError
from pipeline import ranks
from pipeline.ranks import Ranks
from pipeline.training.checkpoints.checkpoint import checkpoint_directory
from pipeline.training.checkpoints.checkpoint_writer import outdated
from pipeline.training.checkpoints.resume import choose_checkpoint, restore, set_aside_later

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_rank(checkpoint: Path) -> None:
    (checkpoint / "rank_00000.safetensors").unlink()


def garble(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE.json").write_bytes(b"\xff\x00{")


def empty(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE.json").write_text("[]")


def forget_the_files(checkpoint: Path) -> None:
    complete = json.loads((checkpoint / "COMPLETE.json").read_text())
    (checkpoint / "COMPLETE.json").write_text(json.dumps(complete | {"files": {"model.safetensors": 3}}))


def make_old(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE.json").write_text(json.dumps({"step": 2, "world_size": 1, "files": {}}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, "rank_00000.safetensors has another sha256 than when it was written"),
        (cut, "model.safetensors has 471 bytes, not 472"),
        (lose_a_rank, "rank_00000.safetensors is missing"),
        (garble, "COMPLETE.json cannot be read"),
        (empty, "COMPLETE.json is damaged"),
        (forget_the_files, "COMPLETE.json is damaged"),
        (make_old, "it has format 1, and this version reads 2"),
        (shutil.rmtree, "it is gone"),
    ],
)
def test_damage_means_the_checkpoint_before_or_a_refusal(
    damage: Callable[[Path], None], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = save_small_checkpoint(tmp_path, 1), save_small_checkpoint(tmp_path, 2)
    assert choose_checkpoint(tmp_path, "auto", ALONE) == second
    assert f"verified {second}: 0.00 GB in" in capsys.readouterr().out
    damage(second)
    assert choose_checkpoint(tmp_path, "auto", ALONE) == first
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"warning: {second} cannot be used: {reason}")
    assert printed[0].endswith("; trying the one before")
    shutil.rmtree(first)
    with pytest.raises(UserError) as caught:
        choose_checkpoint(tmp_path, "auto", ALONE)
    assert str(caught.value).startswith(f"{second} cannot be used: {reason}")
    assert "\n" not in str(caught.value)


def test_what_was_never_finished_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_checkpoint(tmp_path, "auto", ALONE) is None
    assert choose_checkpoint(tmp_path, "never", ALONE) is None
    checkpoint_directory(tmp_path, 1).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert choose_checkpoint(tmp_path, "auto", ALONE) is None
    assert "was stopped before its first checkpoint: it starts again" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run"):
        choose_checkpoint(tmp_path, "never", ALONE)


def test_a_path_is_taken_until_the_run_has_come_from_there(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    first, second, third = (save_small_checkpoint(run, step) for step in (1, 2, 3))
    assert choose_checkpoint(run, str(first), ALONE) == first
    set_aside_later(run, 1)
    assert not second.exists()
    assert [path.name[-13:] for path in sorted(run.glob("checkpoints/set_aside_*"))] == [second.name, third.name]
    made_since = save_small_checkpoint(run, 2, resume=str(first))
    assert choose_checkpoint(run, str(first), ALONE) == made_since, "a requeued job keeps its work"
    # a new run that begins with another's newest
    assert choose_checkpoint(other, str(run), ALONE) == made_since
    save_small_checkpoint(other, 9)
    with pytest.raises(UserError, match="is of another run: choose another"):
        choose_checkpoint(other, str(run), ALONE)
    with pytest.raises(UserError, match="no run or checkpoint there"):
        choose_checkpoint(tmp_path / "new", str(tmp_path / "absent"), ALONE)
    flip_a_byte(first)
    with pytest.raises(UserError, match="step_00000001 cannot be used"):
        choose_checkpoint(tmp_path / "new", str(first), ALONE)


@given(
    gaps=st.lists(st.integers(1, 7), min_size=1, max_size=30),
    keep=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 12),
)
def test_retention(gaps: list[int], keep: int, keep_every: int | None) -> None:
    """Saved one after the other: the newest are there, and of each interval the first that there ever was."""
    there: list[int] = []
    saved: list[int] = []
    for gap in gaps:
        saved.append((saved[-1] if saved else 0) + gap)
        there = [step for step in (*there, saved[-1]) if step not in outdated([*there, saved[-1]], keep, keep_every)]
        wanted = set(saved[-keep:])
        for start in range(keep_every, saved[-1] + 1, keep_every) if keep_every else ():
            wanted |= set([step for step in saved if start <= step < start + keep_every][:1])
        assert set(there) == wanted


def test_a_rank_lost_while_restoring_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    """So the launcher or Slurm starts the run again, as after every loss of a rank."""

    def load_weights(path: Path) -> None:
        raise torch.distributed.DistNetworkError("connection reset by peer")

    state = SimpleNamespace(engine=SimpleNamespace(load_weights=load_weights))
    with pytest.raises(ranks.PeerLostError), ranks.explain_lost_peers():
        restore(cast(Any, state), tmp_path, ALONE)
