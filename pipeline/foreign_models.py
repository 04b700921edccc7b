"""Models of open_clip and transformers, from their files, as models of ours: so that published ones can be rows too."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from formats.errors import UserError
from formats.files import sha256_of
from model.clip import CLIP
from model.config import CLIPConfig, TextConfig, VisionConfig, config_from_name
from model.masking import MaskingConfig
from model.patches import PIXEL_MEAN, PIXEL_STD
from pipeline.data.tokenizer import CLIP_BPE, ClipBytePairs, Tokenizer, load_tokenizer, tokenizer_from_bytes
from pipeline.inference import InferenceModel, first_mismatch, load_for_inference
from pipeline.training.weights.weight_sources import WeightsFile, find_weights, read_traits, read_weights

_OPEN_CLIP_POOLS = {"tok": "class", "avg": "average"}


def load_any_model(
    path: str, device: torch.device, tokenizer: str | None = None, name: str | None = None
) -> InferenceModel:
    """A run, a checkpoint, or a model of open_clip's or transformers' at `path`, ready to encode; fp32.

    tokenizer: of open_clip's models, CLIP's byte pairs by default; of ours, checked to be the one of training
    name: of open_clip's model, for a file without open_clip_config.json beside it
    Raises UserError for everything that does not fit, and for what models here do not have.
    """
    file = find_weights(Path(path))
    if file.library == "ours":
        return load_for_inference(path, device, tokenizer)
    config = _read_config(file, name)
    read_traits(file)  # refuses what the models here do not have
    clip = CLIP(config)
    weights = read_weights(file, clip.state_dict())
    mismatch = first_mismatch(clip, weights)
    if mismatch:
        raise UserError(f"{file.path} is not the {config.name} that its configuration describes: {mismatch}")
    clip.load_state_dict(weights)
    return InferenceModel(
        clip=clip.to(device).eval(),
        tokenizer=_tokenizer(file, tokenizer, config),
        image_size=config.vision.image_size,
        name=config.name,
        checkpoint=str(path),
        step=None,
        samples_seen=None,
        weights_sha256=sha256_of(file.path),
        masking=MaskingConfig(strategy="none"),
    )


def _read_config(file: WeightsFile, name: str | None) -> CLIPConfig:
    if file.config is None:
        if name is None:
            raise UserError(f"{file.path} has no open_clip_config.json beside it: say which model it is with --model")
        try:
            return config_from_name(name)
        except ValueError as error:
            raise UserError(f"--model: {error}") from error
    try:
        content: dict[str, Any] = json.loads(file.config.read_text(encoding="utf-8"))
        if file.library == "open_clip":
            _check_preprocessing(content.get("preprocess_cfg", {}), "mean", "std")
            return _from_open_clip(content["model_cfg"], name or file.config.parent.resolve().name)
        preprocessing = file.config.with_name("preprocessor_config.json")
        if preprocessing.is_file():
            _check_preprocessing(json.loads(preprocessing.read_text(encoding="utf-8")), "image_mean", "image_std")
        return _from_transformers(content, name or file.config.parent.resolve().name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file.config} does not describe a model that can be used here: {error}") from error


def _check_preprocessing(settings: Mapping[str, Any], mean: str, std: str) -> None:
    for key, ours in ((mean, PIXEL_MEAN), (std, PIXEL_STD)):
        theirs = settings.get(key, ours)
        if max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > 1e-6:
            raise ValueError(f"its pixels are normalised with {key} {theirs}, here with {list(ours)}")
    if settings.get("interpolation", "bicubic") != "bicubic" or settings.get("resample", 3) != 3:
        raise ValueError("its images are not resized bicubically")


def _from_open_clip(model: Mapping[str, Any], name: str) -> CLIPConfig:
    vision, text = model["vision_cfg"], model["text_cfg"]
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width = vision.get("width", 768)
    pool = vision.get("pool_type", "tok")
    if not isinstance(vision.get("layers", 12), int) or pool not in _OPEN_CLIP_POOLS:
        raise ValueError("its image tower is no vision transformer with class or average pooling")
    return CLIPConfig(
        name=name,
        embed_dim=model["embed_dim"],
        vision=VisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision["patch_size"],
            width=width,
            layers=vision.get("layers", 12),
            heads=width // vision.get("head_width", 64),
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            pool=_OPEN_CLIP_POOLS[pool],  # type: ignore[arg-type]
            activation=activation,  # type: ignore[arg-type]
        ),
        text=TextConfig(
            width=text["width"],
            layers=text.get("layers", 12),
            heads=text.get("heads", 8),
            context_length=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408),
            eot_token_id=text.get("vocab_size", 49408) - 1,
            mlp_ratio=text.get("mlp_ratio", 4.0),
            activation=activation,  # type: ignore[arg-type]
        ),
        init_logit_bias=model.get("init_logit_bias"),
    )


def _from_transformers(content: Mapping[str, Any], name: str) -> CLIPConfig:
    vision, text = content["vision_config"], content["text_config"]
    width, text_width, vocab_size = vision["hidden_size"], text["hidden_size"], text.get("vocab_size", 49408)
    # 2 is what old configurations say of CLIP's end token, which is the last id all the same
    eot_token_id = text.get("eos_token_id", 2)
    return CLIPConfig(
        name=name,
        embed_dim=content.get("projection_dim", 512),
        vision=VisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision["patch_size"],
            width=width,
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / width,
            activation=vision.get("hidden_act", "quick_gelu"),
        ),
        text=TextConfig(
            width=text_width,
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            context_length=text.get("max_position_embeddings", 77),
            vocab_size=vocab_size,
            eot_token_id=vocab_size - 1 if eot_token_id == 2 else eot_token_id,
            mlp_ratio=text["intermediate_size"] / text_width,
            activation=text.get("hidden_act", "quick_gelu"),
        ),
    )


def _tokenizer(file: WeightsFile, given: str | None, config: CLIPConfig) -> Tokenizer:
    context_length = config.text.context_length
    merges = file.path.with_name("merges.txt")
    if given is None and file.library == "transformers" and merges.is_file():
        # its own byte pairs; compressed as CLIP publishes them, without a time, so that equal merges have equal hashes
        source = gzip.compress(merges.read_bytes(), mtime=0)
        tokenizer = tokenizer_from_bytes(source, context_length, str(merges))
    else:
        tokenizer = load_tokenizer(given or CLIP_BPE, context_length)
    if not isinstance(tokenizer.encoder, ClipBytePairs) or tokenizer.encoder.vocab_size != config.text.vocab_size:
        raise UserError(
            f"{file.path} has an embedding of {config.text.vocab_size:,} tokens and the tokenizer has "
            f"{tokenizer.encoder.vocab_size:,}: give the one it was trained with as --tokenizer"
        )
    return tokenizer
