"""The weights of a run or a checkpoint of ours: which file, and what the checkpoint says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import read_json
from pipeline.training.checkpoints.checkpoint import (
    AVERAGED_WEIGHTS,
    MODEL_CARD,
    WEIGHTS,
    newest_checkpoint,
    what_is_missing,
)


def is_ours(path: Path) -> bool:
    """Whether a file is one of a checkpoint's, or would be the average of a run's weights."""
    return path.name == AVERAGED_WEIGHTS or (path.name == WEIGHTS and path.with_name(MODEL_CARD).is_file())


def find_model(path: Path) -> tuple[Path, Path]:
    """The checkpoint and its file of weights: a run's, or a checkpoint's, averaged if `path` ends in that file's name.

    Raises UserError if there is none.
    """
    if path.name != AVERAGED_WEIGHTS:
        directory = find_checkpoint(path.parent if is_ours(path) else path)
        return directory, directory / WEIGHTS
    directory = find_checkpoint(path.parent)
    if not (directory / AVERAGED_WEIGHTS).exists():
        raise UserError(f"{directory} has no {AVERAGED_WEIGHTS}: it was trained without optimizer.ema_decay")
    return directory, directory / AVERAGED_WEIGHTS


def find_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint of a run directory, or the given one; raises UserError if there is none."""
    if not path.exists():
        raise UserError(f"no run or checkpoint at {path}")
    if (path / MODEL_CARD).exists() or path.name.startswith("step_"):
        problem = what_is_missing(path)
        if problem:
            raise UserError(f"checkpoint {path} is not complete: {problem}")
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint: give a run directory or one of its checkpoints/step_*")
    return newest


def read_card(directory: Path) -> dict[str, Any]:
    """A checkpoint's `model.json`."""
    return read_json(directory / MODEL_CARD)
