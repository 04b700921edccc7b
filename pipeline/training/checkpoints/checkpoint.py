"""What a checkpoint is: a directory that is complete, or does not count.

`RUN/checkpoints/step_00001000` holds `model.safetensors`, `model.json` and `tokenizer.bin`, to evaluate, and to resume
`rank_00000.safetensors`, … (the optimizer's state in parts, random number generators) and a file for each `Carried`.
COMPLETE.json, written last, names every file with its size and sha256. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from formats.errors import UserError
from formats.files import sha256_of
from model.masking import MaskingConfig
from pipeline.training.engines.engine import Engine
from pipeline.training.progress import Progress

FORMAT_VERSION = 2
COMPLETE = "COMPLETE.json"
AVERAGED_WEIGHTS = "model_ema.safetensors"
WEIGHTS, MODEL_CARD, TOKENIZER = "model.safetensors", "model.json", "tokenizer.bin"


class Carried(Protocol):
    """What the rest of a run depends on beside engine and place: kept in `NAME.safetensors`, the same on all ranks."""

    @property
    def name(self) -> str:
        """Of the file."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to keep, none if it keeps nothing in this run. Collective."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""


@dataclass(frozen=True)
class TrainingState:
    """What a stage trains, as far as a checkpoint keeps it.

    weights: what follows the engine's weights, and goes back with them when a run rolls back
    counters: what counts on, whatever happens to weights
    """

    engine: Engine
    masking: MaskingConfig
    weights: Sequence[Carried] = ()
    counters: Sequence[Carried] = ()

    @property
    def carried(self) -> tuple[Carried, ...]:
        """All that a checkpoint keeps beside the engine and its place."""
        return (*self.weights, *self.counters)


@dataclass(frozen=True)
class FileRecord:
    """What COMPLETE.json says of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """What COMPLETE.json says of a checkpoint; `recipe` and `versions` are those of the run that wrote it."""

    progress: Progress
    world_size: int
    zero_stage: int
    precision: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    files: dict[str, FileRecord]

    def to_json(self) -> dict[str, Any]:
        """The content of COMPLETE.json."""
        fields = asdict(self)
        return {"format_version": FORMAT_VERSION, **fields.pop("progress"), **fields}


def checkpoints_directory(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def checkpoint_directory(run_directory: Path, step: int) -> Path:
    """Where a run's checkpoint after so many steps is, or would be."""
    return checkpoints_directory(run_directory) / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint of a run was saved, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def rank_file(rank: int) -> str:
    """The name of what one rank writes."""
    return f"rank_{rank:05d}.safetensors"


def carried_file(carried: Carried) -> str:
    """The name of the file that keeps it."""
    return f"{carried.name}.safetensors"


def read_contents(checkpoint: Path) -> Contents:
    """COMPLETE.json; raises UserError that says why it does not count."""
    try:
        content: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text())
    except FileNotFoundError:
        why = f"no {COMPLETE}: the run stopped while saving it" if checkpoint.is_dir() else "it is gone"
        raise UserError(why) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{COMPLETE} cannot be read: {error}") from None
    try:
        version = content.pop("format_version", 1)
        if version != FORMAT_VERSION:
            raise UserError(f"it has format {version}, and this version reads {FORMAT_VERSION}")
        progress = Progress.from_record({name: content.pop(name) for name in Progress.__dataclass_fields__})
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return Contents(progress=progress, files=files, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{COMPLETE} is damaged: {type(error).__name__} {error}") from None


def find_damage(checkpoint: Path, files: Mapping[str, FileRecord], hashed: Collection[str] = ()) -> str | None:
    """What is wrong with files of a checkpoint, None if nothing: all have their size, `hashed` their content too."""
    for name, record in files.items():
        path = checkpoint / name
        try:
            size_bytes = path.stat().st_size
            if size_bytes != record.size_bytes:
                return f"{name} has {size_bytes:,} bytes, not {record.size_bytes:,}"
            if name in hashed and sha256_of(path) != record.sha256:
                return f"{name} has another sha256 than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete: every file there, at its recorded size."""
    try:
        return find_damage(checkpoint, read_contents(checkpoint).files)
    except UserError as error:
        return str(error)


def list_checkpoints(run_directory: Path) -> list[Path]:
    """All of a run's, usable or not, oldest first."""
    return sorted(checkpoints_directory(run_directory).glob("step_[0-9]*"))


def complete_checkpoints(run_directory: Path) -> list[Path]:
    """Usable checkpoints of a run, oldest first."""
    return [checkpoint for checkpoint in list_checkpoints(run_directory) if what_is_missing(checkpoint) is None]


def newest_checkpoint(run_directory: Path) -> Path | None:
    """The newest usable checkpoint, or None if the run never saved one.

    Raises UserError if checkpoints exist but none is usable.
    """
    complete = complete_checkpoints(run_directory)
    if complete:
        return complete[-1]
    finished = [checkpoint for checkpoint in list_checkpoints(run_directory) if (checkpoint / COMPLETE).exists()]
    if finished:
        raise UserError(f"{finished[-1]} cannot be used: {what_is_missing(finished[-1])}")
    return None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file, by name; raises UserError if it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
