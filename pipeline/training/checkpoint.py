"""Checkpoints: written by all ranks, published by one, complete or not there at all.

A checkpoint is a directory `RUN/checkpoints/step_00001000` with DeepSpeed's files (to resume), `model.safetensors`,
`model.json` and `tokenizer.bin` (to evaluate: nothing is unpickled), and for `masking.strategy: attentive` its moving
average, `attentive_copy.safetensors` (to resume). It counts once COMPLETE.json, written last, names every file with its
size. DeepSpeed's own `latest` is not crash-safe and is not used.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.clip import CLIP
from model.masking import MaskingConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UserError
from pipeline.files import flush_to_disk, sha256_of_file, write_atomically, write_json
from pipeline.ranks import Ranks
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.progress import Progress

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

COMPLETE = "COMPLETE.json"
WEIGHTS, MODEL_CARD, TOKENIZER = "model.safetensors", "model.json", "tokenizer.bin"
ATTENTIVE_COPY = "attentive_copy.safetensors"


def checkpoints_directory(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def checkpoint_directory(run_directory: Path, step: int) -> Path:
    """Where a run's checkpoint after so many steps is, or would be."""
    return checkpoints_directory(run_directory) / f"step_{step:08d}"


def save_checkpoint(
    engine: DeepSpeedEngine,
    run_directory: Path,
    progress: Progress,
    tokenizer: Tokenizer,
    masks: MaskDrawer,
    keep: int,
    ranks: Ranks,
) -> Path:
    """Save on all ranks (collective), publish, then delete all but the newest `keep` checkpoints.

    So the last checkpoint of a stage stays at least until the next stage has one.
    """
    directory = checkpoint_directory(run_directory, progress.step)
    if ranks.is_main and directory.exists():
        shutil.rmtree(directory)  # what a killed run left of the same step
    ranks.barrier()
    engine.save_checkpoint(str(directory.parent), tag=directory.name, save_latest=False)
    weights = full_weights(engine.module)
    if ranks.is_main:
        _write_model_files(directory, engine.module, weights, progress, tokenizer, masks.config)
        if masks.copy:  # the same on all ranks
            _save_weights(masks.state(), directory / ATTENTIVE_COPY)
    ranks.barrier()
    if ranks.is_main:
        _publish(directory, progress, ranks.world_size)
        for old in complete_checkpoints(run_directory)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    return directory


def full_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """The fp32 weights of a model that DeepSpeed trains, whatever the ZeRO stage. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        weights[name] = (parameter.detach() if full is None else full).float().cpu().contiguous()
    return weights


def _write_model_files(
    directory: Path,
    clip: CLIP,
    weights: dict[str, Tensor],
    progress: Progress,
    tokenizer: Tokenizer,
    masking: MaskingConfig,
) -> None:
    _save_weights(weights, directory / WEIGHTS)
    (directory / TOKENIZER).write_bytes(tokenizer.source)
    card = {
        "format_version": 1,
        "model": clip.config.to_dict(),
        "masking": asdict(masking),
        "tokenizer_sha256": tokenizer.sha256,
        "weights_sha256": sha256_of_file(directory / WEIGHTS),
        **asdict(progress),
    }
    (directory / MODEL_CARD).write_text(json.dumps(card, indent=2) + "\n")


def _save_weights(weights: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(weights, path)
    path.chmod(mode)  # safetensors makes files for their owner alone


def _publish(directory: Path, progress: Progress, world_size: int) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        flush_to_disk(path)
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    write_json(directory / COMPLETE, {**asdict(progress), "world_size": world_size, "files": sizes})
    flush_to_disk(directory)
    write_atomically(directory.parent / "latest", directory.name + "\n")


def what_is_missing(directory: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete: every file there, at its recorded size."""
    try:
        complete = json.loads((directory / COMPLETE).read_text())
    except (OSError, ValueError):
        return f"no readable {COMPLETE}: the run stopped while saving it"
    for name, size in complete["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def complete_checkpoints(run_directory: Path) -> list[Path]:
    """Usable checkpoints of a run, oldest first."""
    candidates = sorted(checkpoints_directory(run_directory).glob("step_*"))
    return [directory for directory in candidates if what_is_missing(directory) is None]


def newest_checkpoint(run_directory: Path) -> Path | None:
    """The newest usable checkpoint, or None if the run never saved one.

    Raises UserError if checkpoints exist but none is usable: starting afresh would silently throw the run away.
    """
    complete = complete_checkpoints(run_directory)
    if complete:
        return complete[-1]
    broken = sorted(checkpoints_directory(run_directory).glob("step_*"))
    finished = [directory for directory in broken if (directory / COMPLETE).exists()]
    if finished:
        raise UserError(
            f"{finished[-1]} cannot be used: {what_is_missing(finished[-1])}; restore it, or choose another "
            "train.output to start afresh"
        )
    return None


def check_world_size(checkpoint: Path, ranks: Ranks) -> None:
    """Raise UserError if a run cannot go on with these ranks."""
    record = json.loads((checkpoint / COMPLETE).read_text())
    if record["world_size"] != ranks.world_size:
        raise UserError(
            f"{checkpoint} was written by {record['world_size']} ranks and now there are {ranks.world_size}: "
            f"start the same number, or choose another train.output"
        )


def read_progress(checkpoint: Path) -> Progress:
    """How far a run had come at a checkpoint."""
    record: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text())
    try:
        return Progress.from_record(record)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint} was written by a version that read the data in another order; choose another train.output"
        ) from error


def resume(engine: DeepSpeedEngine, checkpoint: Path, masks: MaskDrawer) -> None:
    """Load weights and optimiser into the engine, and what masks depend on (collective)."""
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise UserError(f"DeepSpeed could not load {checkpoint}")
    if masks.copy:
        try:
            masks.load_state(load_file(checkpoint / ATTENTIVE_COPY))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{checkpoint / ATTENTIVE_COPY} cannot be read: {error}") from error
