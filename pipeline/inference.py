"""A trained model ready to encode, from a checkpoint's safe files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from formats.errors import UserError
from model.clip import CLIP
from model.config import CLIPConfig
from model.masking import MaskingConfig
from pipeline.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_bytes
from pipeline.training.checkpoints.checkpoint import (
    AVERAGED_WEIGHTS,
    MODEL_CARD,
    TOKENIZER,
    WEIGHTS,
    FileRecord,
    find_damage,
    newest_checkpoint,
    read_contents,
    what_is_missing,
)


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it is that gave some features: what results say of it."""

    name: str
    checkpoint: str
    step: int | None
    samples_seen: int | None
    image_size: int
    weights_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class InferenceModel:
    """A model in evaluation mode with its tokenizer, and where it comes from; step and samples seen if it is ours."""

    clip: CLIP
    tokenizer: Tokenizer
    image_size: int
    name: str
    checkpoint: str
    step: int | None
    samples_seen: int | None
    weights_sha256: str
    masking: MaskingConfig

    @property
    def identity(self) -> ModelIdentity:
        """The same without the model."""
        return ModelIdentity(
            self.name,
            self.checkpoint,
            self.step,
            self.samples_seen,
            self.image_size,
            self.weights_sha256,
            self.tokenizer.sha256,
        )


def load_for_inference(path: str, device: torch.device, tokenizer: str | None = None) -> InferenceModel:
    """Load a run's newest complete checkpoint, or one checkpoint directory; fp32 weights, nothing unpickled.

    With `/model_ema.safetensors` behind either, the average of its weights.

    `tokenizer`, if given, must be the one the model was trained with. Raises UserError for everything that does not
    fit: no checkpoint, an incomplete or damaged one, weights of another model, another tokenizer.
    """
    directory, file = find_model(Path(path))
    record = _check_content(directory, file)
    card = read_card(directory)
    try:
        config = CLIPConfig.from_dict(card["model"])
        masking = MaskingConfig(**card["masking"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / MODEL_CARD} does not describe a model: {error}") from error
    clip = CLIP(config)
    _load_weights(clip, file)
    trained_with = tokenizer_from_bytes(
        (directory / TOKENIZER).read_bytes(), config.text.context_length, str(directory / TOKENIZER)
    )
    if trained_with.sha256 != card["tokenizer_sha256"]:
        raise UserError(
            f"{directory / TOKENIZER} is not the tokenizer that {directory / MODEL_CARD} names: put the run's own back"
        )
    if tokenizer is not None:
        given = load_tokenizer(tokenizer, config.text.context_length)
        if given.sha256 != card["tokenizer_sha256"]:
            raise UserError(
                f"{tokenizer} is not the tokenizer that {directory} was trained with "
                f"({given.encoder.vocab_size} tokens, the model has {config.text.vocab_size}); leave --tokenizer out "
                "to use the checkpoint's own"
            )
    return InferenceModel(
        clip=clip.to(device).eval(),
        tokenizer=trained_with,
        image_size=config.vision.image_size,
        name=config.name,
        checkpoint=str(directory if file.name == WEIGHTS else file),
        step=card["step"],
        samples_seen=card["samples_seen"],
        weights_sha256=record.sha256,
        masking=masking,
    )


def _check_content(directory: Path, weights: Path) -> FileRecord:
    """What was recorded of the weights; UserError if they or the card are not what was written, to the bit."""
    files = read_contents(directory).files
    problem = find_damage(directory, files, hashed=(weights.name, MODEL_CARD))
    if problem:
        raise UserError(f"checkpoint {directory} is damaged: {problem}; take another of the run")
    return files[weights.name]


def find_model(path: Path) -> tuple[Path, Path]:
    """The checkpoint and its file of weights: a run's, or a checkpoint's, averaged if `path` ends in that file's name.

    Raises UserError if there is none.
    """
    if path.name != AVERAGED_WEIGHTS:
        directory = find_checkpoint(path)
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
    try:
        card: dict[str, Any] = json.loads((directory / MODEL_CARD).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / MODEL_CARD} cannot be read: {error}") from error
    return card


def _load_weights(clip: CLIP, file: Path) -> None:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    mismatch = first_mismatch(clip, weights)
    if mismatch:
        raise UserError(
            f"{file} is not a {clip.config.name}: {mismatch}; {MODEL_CARD} and weights belong to different models"
        )
    clip.load_state_dict(weights)


def first_mismatch(clip: CLIP, weights: Mapping[str, Tensor]) -> str | None:
    """The first parameter whose shape is not the model's, or that one of them lacks; None if all fit."""
    expected = {name: tuple(value.shape) for name, value in clip.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} is {found.get(name, 'absent')}, the model's is {expected.get(name, 'absent')}"
    return None
