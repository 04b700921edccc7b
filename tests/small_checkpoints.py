"""Checkpoints without a model: of two files, with what resuming looks at first."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from formats.files import sha256_of
from pipeline.training.checkpoints.checkpoint import Contents, FileRecord, checkpoint_directory
from pipeline.training.checkpoints.checkpoint_writer import publish
from pipeline.training.progress import Progress


def save_small_checkpoint(run: Path, step: int, resume: str = "auto") -> Path:
    """Publish a run's checkpoint; `resume`: the option with which the run was started."""
    directory = checkpoint_directory(run, step)
    directory.mkdir(parents=True)
    for name in ("model.safetensors", "rank_00000.safetensors"):
        save_file({"a": torch.full((100,), float(step))}, directory / name)
    files = {path.name: FileRecord(path.stat().st_size, sha256_of(path)) for path in directory.iterdir()}
    publish(directory, Contents(Progress(step, step), 1, 1, "fp32", {}, {"train": {"resume": resume}}, files))
    return directory
