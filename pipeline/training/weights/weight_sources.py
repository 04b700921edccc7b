"""Weights of others and of our own runs under our names, with what lies beside them: configuration and tokenizer.

Nothing is unpickled but tensors: files of torch are read with `weights_only`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from formats.errors import UserError
from model.config import CLIPConfig
from model.open_clip_weights import from_open_clip
from model.transformers_weights import from_transformers
from pipeline.inference import find_model, read_card
from pipeline.training.checkpoints.checkpoint import AVERAGED_WEIGHTS, MODEL_CARD

_OPEN_CLIP_CONFIG, _TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPEN_CLIP_POOLS = {"tok": "class", "avg": "average"}
# What changes the features of open_clip's models and leaves the names and shapes of their weights as they are.
_OPEN_CLIP_EXTRAS = ("act_kwargs", "norm_kwargs", "no_causal_mask", "final_ln_after_pool")
_LAYER_NORM_EPS = 1e-5

# What a model does that its weights do not show, in words.
Traits = dict[str, str | int]


@dataclass(frozen=True)
class WeightsFile:
    """One file of weights, whose names they have, and the configuration beside it, if any."""

    path: Path
    library: Literal["ours", "open_clip", "transformers"]
    config: Path | None


def find_weights(source: Path) -> WeightsFile:
    """The weights at a path: a file of open_clip's, a folder of open_clip's or transformers', a run or a checkpoint.

    Raises UserError if there are none.
    """
    is_average = source.name == AVERAGED_WEIGHTS  # of a run, or of a checkpoint, where it is a file
    if not source.exists() and not is_average:
        raise UserError(f"no weights at {source}: give a run, open_clip's file or folder, or transformers' folder")
    if source.is_file() and not is_average:
        config = source.with_name(_OPEN_CLIP_CONFIG)
        return WeightsFile(source, "open_clip", config if config.is_file() else None)
    if (source / _OPEN_CLIP_CONFIG).is_file():
        for path in (source / name for name in _OPEN_CLIP_FILES):
            if path.is_file():
                return WeightsFile(path, "open_clip", source / _OPEN_CLIP_CONFIG)
        raise UserError(f"{source} has {_OPEN_CLIP_CONFIG}, and none of {', '.join(_OPEN_CLIP_FILES)}")
    if (source / _TRANSFORMERS_CONFIG).is_file():
        return WeightsFile(source / "model.safetensors", "transformers", source / _TRANSFORMERS_CONFIG)
    checkpoint, weights = find_model(source)
    return WeightsFile(weights, "ours", checkpoint / MODEL_CARD)


def read_weights(file: WeightsFile, names: Iterable[str]) -> dict[str, Tensor]:
    """Its weights as a state dict of `model.clip.CLIP`; `names` are those of the model that is to have them.

    Raises UserError if the file cannot be read, or does not hold such a model. Shapes are not looked at.
    """
    weights = _read_tensors(file.path)
    try:
        if file.library == "open_clip":
            return from_open_clip(weights)
        if file.library == "transformers":
            # buffers that old versions saved
            weights = {name: value for name, value in weights.items() if not name.endswith(".position_ids")}
            return from_transformers(weights, names)
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{file.path} does not fit: {error}") from error
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch's reader raises whatever it likes
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not a plain file of tensors, and nothing else is unpickled: {reason}") from error
    # open_clip's own training checkpoints keep the weights beside the optimizer's state
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds something else than the weights of one model")
    return {str(name).removeprefix("module."): value for name, value in weights.items()}


def own_traits(config: CLIPConfig) -> Traits:
    """The traits of a model here."""
    return {
        "image activation": config.activation,
        "text activation": config.activation,
        "image pooling": config.vision.pool,
        "image heads": config.vision.heads,
        "text heads": config.text.heads,
    }


def read_traits(file: WeightsFile) -> Traits | None:
    """The traits that the configuration beside the weights tells, None if there is no configuration.

    Raises UserError if it cannot be read, or tells of something that models here do not have.
    """
    if file.config is None:
        return None
    try:
        if file.library == "ours":
            return own_traits(CLIPConfig.from_dict(read_card(file.config.parent)["model"]))
        content = json.loads(file.config.read_text(encoding="utf-8"))
        return _open_clip_traits(content) if file.library == "open_clip" else _transformers_traits(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file.config} does not describe a model that can be used here: {error}") from error


def _open_clip_traits(content: Mapping[str, Any]) -> Traits:
    model = content["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    for name, tower in (("vision_cfg", vision), ("text_cfg", text)):
        for extra in _OPEN_CLIP_EXTRAS:
            if tower.get(extra):
                raise ValueError(f"{name} has {extra}")
    if text.get("pool_type", "argmax") != "argmax":
        raise ValueError(f"text_cfg has pool_type {text['pool_type']}")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    pool = vision.get("pool_type", "tok")
    return {
        "image activation": activation,
        "text activation": activation,
        "image pooling": _OPEN_CLIP_POOLS.get(pool, pool),
        "image heads": vision.get("width", 768) // vision.get("head_width", 64),
        "text heads": text.get("heads", 8),
    }


def _transformers_traits(content: Mapping[str, Any]) -> Traits:
    if content.get("model_type") != "clip":
        raise ValueError(f"model_type is {content.get('model_type')}, not clip")
    vision, text = content["vision_config"], content["text_config"]
    for tower in (vision, text):
        if tower.get("layer_norm_eps", _LAYER_NORM_EPS) != _LAYER_NORM_EPS:
            raise ValueError(f"layer_norm_eps is {tower['layer_norm_eps']}, not {_LAYER_NORM_EPS}")
    return {
        "image activation": vision.get("hidden_act", "quick_gelu"),
        "text activation": text.get("hidden_act", "quick_gelu"),
        "image pooling": "class",
        "image heads": vision.get("num_attention_heads", 12),
        "text heads": text.get("num_attention_heads", 8),
    }
