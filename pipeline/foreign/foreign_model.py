"""A model of another library: where its files are, what they say, and its weights under our names.

Names of weights tell whose they are: open_clip's and transformers' files often lie side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from formats.errors import UserError
from model.config import CLIPConfig
from model.open_clip_weights import from_open_clip
from model.transformers_weights import from_transformers
from pipeline.data.captions import Tokenizer
from pipeline.data.image_transform import Preprocessing
from pipeline.foreign import open_clip_folder, transformers_folder
from pipeline.foreign.byte_pairs import read_byte_pairs
from pipeline.foreign.fields import UNREADABLE
from pipeline.foreign.tensor_files import find_parts, read_parts, sha256_of_parts

_CONFIGS = (open_clip_folder.CONFIG, transformers_folder.CONFIG)
_WEIGHTS = (*open_clip_folder.WEIGHTS_NAMES, *transformers_folder.WEIGHTS_NAMES)
# What is no weight, and which some versions saved: the causal mask, and the numbers 0, 1, 2, …
_BUFFERS = {"attn_mask", "position_ids"}


@dataclass(frozen=True)
class ForeignFiles:
    """A file of weights, or the parts of one; `path` is what messages call it."""

    path: Path
    parts: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where they are, and their settings, if any."""
        return self.parts[0].parent

    @property
    def sha256(self) -> str:
        """The hash of the weights."""
        return sha256_of_parts(self.parts)


def find_foreign(source: Path) -> ForeignFiles | None:
    """A file of weights, or a folder of open_clip's or transformers'; None for anything else, such as a run.

    Raises UserError for such a folder without weights.
    """
    if source.is_file():
        return ForeignFiles(source, (source,))
    configs = [name for name in _CONFIGS if (source / name).is_file()]
    if not configs:
        return None
    parts = find_parts(source, _WEIGHTS)
    if not parts:
        raise UserError(f"{source} has {configs[0]}, and none of {', '.join(_WEIGHTS)}: give its file of weights")
    return ForeignFiles(parts[0] if len(parts) == 1 else source, parts)


@dataclass(frozen=True)
class ForeignModel:
    """What the files say: weights under their own names, and settings.

    is_openai: one of OpenAI's files, which say by their shapes and numbers what they are
    config: None for weights with no configuration beside them, `settings` is {} then
    """

    files: ForeignFiles
    is_transformers: bool
    is_openai: bool
    config: CLIPConfig | None
    settings: Mapping[str, Any]
    theirs: Mapping[str, Tensor]

    @property
    def config_file(self) -> Path:
        """Where its configuration is, or would be."""
        return self.files.folder / (transformers_folder.CONFIG if self.is_transformers else open_clip_folder.CONFIG)

    def with_bias(self, config: CLIPConfig) -> CLIPConfig:
        """The model with a bias of logits if the weights have one, which those trained with the sigmoid loss do."""
        bias = self.theirs.get("logit_bias")
        return replace(config, init_logit_bias=None if bias is None else bias.item())

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Its weights as a state dict of `model.clip.CLIP`; `names` are those of the model that is to have them.

        Raises UserError if they are not those of such a model. Shapes are not looked at.
        """
        try:
            theirs = {name: value for name, value in self.theirs.items() if name.split(".")[-1] not in _BUFFERS}
            for name, value in theirs.items():
                if not value.is_floating_point():
                    raise ValueError(f"{name} is {value.dtype}: quantised weights are not read, save them as float32")
                if not value.isfinite().all():
                    raise ValueError(f"{name} is not finite: the model's training had failed when it was saved")
            if not self.is_transformers:
                return from_open_clip(theirs)
            return from_transformers(theirs, (name for name in names if name != "logit_bias"))
        except (ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"{self.files.path} does not fit: {error}") from error

    def preprocessing(self, size: int) -> Preprocessing:
        """How its images become pixels; UserError for what cannot be done here."""
        if self.is_transformers:
            return transformers_folder.read_preprocessing(self.files.folder, size)
        try:
            return open_clip_folder.read_preprocessing(self.settings, size)
        except UNREADABLE as error:
            raise UserError(f"{self.config_file} asks for images that cannot be made here: {error}") from error

    def own_tokenizer(self, context_length: int) -> Tokenizer | None:
        """The byte pairs that it brings along, None if it has CLIP's; UserError for another kind of tokenizer."""
        name = open_clip_folder.tokenizer_name(self.settings)
        if not self.is_transformers and name is None:
            return None
        tokenizer = read_byte_pairs(self.files.folder, context_length)
        if tokenizer is None and name is not None:
            raise UserError(f"{self.config_file} names the tokenizer {name}: put its tokenizer.json beside it")
        return tokenizer


def read_foreign(files: ForeignFiles, name: str | None = None) -> ForeignModel:
    """Read weights and configuration; `name` is what the model is to be called, by default as its folder is.

    Raises UserError for what cannot be read, and for a model that models here cannot be.
    """
    theirs, is_openai = read_parts(files.parts)
    is_transformers = _is_transformers(theirs, files.folder)
    model = ForeignModel(files, is_transformers, is_openai, None, {}, theirs)
    try:
        if model.config_file.is_file():
            settings = json.loads(model.config_file.read_text(encoding="utf-8"))
            read = transformers_folder.read_config if is_transformers else open_clip_folder.read_config
            config = read(settings, name or files.folder.resolve().name)
            return replace(model, settings=settings, config=config)
    except UNREADABLE as error:
        raise UserError(f"{model.config_file} does not describe a model that can be used here: {error}") from error
    if is_transformers:
        raise UserError(f"{files.path} has transformers' weights, and no {transformers_folder.CONFIG} beside it")
    return model


def _is_transformers(theirs: Mapping[str, Tensor], folder: Path) -> bool:
    if "visual.conv1.weight" in theirs or (folder / open_clip_folder.CONFIG).is_file():
        return any(name.startswith("vision_model.") for name in theirs)
    return (folder / transformers_folder.CONFIG).is_file() or any(name.startswith("vision_model.") for name in theirs)
