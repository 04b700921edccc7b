"""A trained model ready to encode: of a run's checkpoint, from its safe files alone, or of another library."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.errors import UserError
from model.clip import CLIP
from model.config import CLIPConfig, config_from_name
from model.masking import MaskingConfig
from pipeline.data.captions import CLIP_BPE, ClipBytePairs, Tokenizer, load_tokenizer, tokenizer_from_bytes
from pipeline.data.image_transform import Preprocessing
from pipeline.evaluation.results import ModelIdentity
from pipeline.foreign.foreign_model import ForeignModel, find_foreign, read_foreign
from pipeline.foreign.open_clip_folder import openai_config
from pipeline.training.checkpoints.checkpoint import (
    MODEL_CARD,
    TOKENIZER,
    WEIGHTS,
    FileRecord,
    find_damage,
    read_contents,
    read_tensors,
)
from pipeline.training.weights.run_weights import find_model, is_ours, read_card


@dataclass(frozen=True)
class InferenceModel:
    """A model in evaluation mode with its tokenizer, and where it comes from; step and samples seen if it is ours."""

    clip: CLIP
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    name: str
    checkpoint: str
    step: int | None
    samples_seen: int | None
    weights_sha256: str
    masking: MaskingConfig
    settings_sha256: str = ""

    @property
    def image_size(self) -> int:
        """Of the square images that it takes, in pixels."""
        return self.preprocessing.size

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
            self.settings_sha256,
        )


def load_any_model(
    path: str, device: torch.device, tokenizer: str | None = None, name: str | None = None
) -> InferenceModel:
    """A run, a checkpoint, or a model of open_clip's or transformers' at `path`, ready to encode; fp32.

    tokenizer: of open_clip's models, CLIP's byte pairs by default; of ours, checked to be the one of training
    name: of open_clip's model, for a file without open_clip_config.json beside it
    Raises UserError for everything that does not fit, and for what models here do not have.
    """
    files = None if is_ours(Path(path)) else find_foreign(Path(path))
    if files is None:
        return load_for_inference(path, device, tokenizer)
    model = read_foreign(files, name)
    config = model.with_bias(model.config or _named(model, name))
    clip = CLIP(config)
    weights = model.weights(clip.state_dict())
    mismatch = clip.first_mismatch(weights)
    if mismatch:
        source = "its configuration describes" if model.config else "--model names"
        raise UserError(f"{files.path} is not the {config.name} that {source}: {mismatch}")
    clip.load_weights(weights)
    preprocessing = model.preprocessing(config.vision.image_size)
    return InferenceModel(
        clip=clip.to(device).eval(),
        tokenizer=_tokenizer_of(model, tokenizer, config),
        preprocessing=preprocessing,
        name=config.name,
        checkpoint=path,
        step=None,
        samples_seen=None,
        weights_sha256=files.sha256,
        masking=MaskingConfig(strategy="none"),
        settings_sha256=_sha256_of_settings(config, preprocessing),
    )


def _named(model: ForeignModel, name: str | None) -> CLIPConfig:
    """The model that a file without a configuration is said to be, or that one of OpenAI's is."""
    path = model.files.path
    if name is None:
        known = openai_config(model.theirs, path.stem) if model.is_openai else None
        if known is None:
            raise UserError(f"{path} has no {model.config_file.name} beside it: say which it is with --model")
        return known
    try:
        config = config_from_name(name)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    if model.is_openai and config.activation != "quick_gelu":
        raise UserError(f"{path} is of OpenAI's form, which has QuickGELU: --model {name}-quickgelu")
    return config


def _tokenizer_of(model: ForeignModel, given: str | None, config: CLIPConfig) -> Tokenizer:
    context_length, vocab_size = config.text.context_length, config.text.vocab_size
    own = None if given else model.own_tokenizer(context_length)
    tokenizer = own or load_tokenizer(given or CLIP_BPE, context_length)
    if not isinstance(tokenizer.encoder, ClipBytePairs) or tokenizer.encoder.vocab_size != vocab_size:
        raise UserError(
            f"{model.files.path} has an embedding of {vocab_size:,} tokens and the tokenizer has "
            f"{tokenizer.encoder.vocab_size:,}: give the one it was trained with as --tokenizer"
        )
    return tokenizer


def _sha256_of_settings(config: CLIPConfig, preprocessing: Preprocessing) -> str:
    """Names what is computed with the weights: two folders may hold the same ones and different settings."""
    settings = [config.to_dict() | {"name": ""}, dataclasses.asdict(preprocessing)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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
        preprocessing=Preprocessing(config.vision.image_size),
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


def _load_weights(clip: CLIP, file: Path) -> None:
    weights = read_tensors(file)
    mismatch = clip.first_mismatch(weights)
    if mismatch:
        raise UserError(
            f"{file} is not a {clip.config.name}: {mismatch}; {MODEL_CARD} and weights belong to different models"
        )
    clip.load_weights(weights)
