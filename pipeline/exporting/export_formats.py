"""What other libraries want beside the weights: configuration, preprocessing, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from formats.errors import UserError
from model.config import CLIPConfig, Pool
from model.open_clip_weights import from_open_clip, to_open_clip
from model.patches import PIXEL_MEAN, PIXEL_STD
from model.transformers_weights import from_transformers, to_transformers
from pipeline.data.tokenizer import ClipBytePairs
from pipeline.inference import InferenceModel

Weights = Mapping[str, Tensor]

# transformers knows CLIP's two special tokens under these names only
_START_TOKEN, _END_TOKEN = "<|startoftext|>", "<|endoftext|>"
_CLIP_VOCAB_SIZE = 49_408
_OPEN_CLIP_POOLS: dict[Pool, str] = {"class": "tok", "average": "avg"}


@dataclass(frozen=True)
class ExportFormat:
    """One library's folder: the weights' file and names, the text files beside it, and how to load it.

    `from_theirs` takes their weights and the state dict of the model to be loaded. `text_files` raises UserError if
    the library cannot hold the model.
    """

    weights_file: str
    to_theirs: Callable[[Weights], dict[str, Tensor]]
    from_theirs: Callable[[Weights, Weights], dict[str, Tensor]]
    text_files: Callable[[InferenceModel], dict[str, str]]
    load_with: str


def _byte_pairs(model: InferenceModel) -> ClipBytePairs:
    encoder = model.tokenizer.encoder
    if not isinstance(encoder, ClipBytePairs):
        raise UserError(
            f"{model.checkpoint} was trained with a SentencePiece tokenizer, and their CLIP models read CLIP's byte "
            "pairs: captions would silently get other ids; only runs with data.tokenizer=clip-bpe can be exported"
        )
    return encoder


def _refuse_pool(model: InferenceModel, library: str, known: Collection[Pool]) -> None:
    pool = model.clip.config.vision.pool
    if pool not in known:
        raise UserError(
            f"{model.checkpoint} was trained with model.pool={pool}, and {library}'s CLIP has {' or '.join(known)} "
            "pooling only: it cannot be exported to that library"
        )


def _open_clip_files(model: InferenceModel) -> dict[str, str]:
    _refuse_pool(model, "open_clip", _OPEN_CLIP_POOLS)
    encoder = _byte_pairs(model)
    if encoder.vocab_size != _CLIP_VOCAB_SIZE:
        raise UserError(
            f"{model.checkpoint} was trained with {encoder.vocab_size} byte pairs, and open_clip always uses its own "
            f"{_CLIP_VOCAB_SIZE}: export it with --format transformers, which takes the tokenizer along"
        )
    preprocessing = {
        "size": model.image_size,
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    content = {"model_cfg": open_clip_config(model.clip.config), "preprocess_cfg": preprocessing}
    return {"open_clip_config.json": _json(content)}


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """The model as open_clip's model files describe it; KeyError for attention pooling, which it does not have."""
    vision, text = config.vision, config.text
    bias = {} if config.init_logit_bias is None else {"init_logit_bias": config.init_logit_bias}
    return {
        "embed_dim": config.embed_dim,
        **bias,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.mlp_ratio,
            "pool_type": _OPEN_CLIP_POOLS[vision.pool],
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
        },
    }


def _transformers_files(model: InferenceModel) -> dict[str, str]:
    _refuse_pool(model, "transformers", ["class"])
    if model.clip.logit_bias is not None:
        raise UserError(
            f"{model.checkpoint} was trained with loss.kind=sigmoid, and transformers' CLIP has no logit bias: its "
            "probabilities would be wrong; export it with --format open_clip"
        )
    encoder = _byte_pairs(model)
    tokens = [*encoder.tokens[:-2], _START_TOKEN, _END_TOKEN]
    tokenizer = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": _START_TOKEN,
        "eos_token": _END_TOKEN,
        "unk_token": _END_TOKEN,
        "pad_token": _END_TOKEN,
        "do_lower_case": True,
        "model_max_length": model.tokenizer.context_length,
    }
    merges = ["#version: 0.2", *(f"{first} {second}" for first, second in encoder.merges)]
    return {
        "config.json": _json(_transformers_config(model)),
        "preprocessor_config.json": _json(_transformers_preprocessing(model.image_size)),
        "tokenizer_config.json": _json(tokenizer),
        "vocab.json": json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(merges) + "\n",
    }


def _transformers_config(model: InferenceModel) -> dict[str, Any]:
    config = model.clip.config
    vision, text = config.vision, config.text
    # named in every part: a default would be quick_gelu, and 2 as end token selects another way of pooling
    shared = {"hidden_act": config.activation, "layer_norm_eps": 1e-5, "projection_dim": config.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": shared
        | {
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": model.tokenizer.encoder.start_token_id,
            "eos_token_id": text.eot_token_id,
            "pad_token_id": text.eot_token_id,
        },
        "vision_config": shared
        | {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
    }


def _transformers_preprocessing(image_size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": PIXEL_MEAN,
        "image_std": PIXEL_STD,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


FORMATS = {
    "open_clip": ExportFormat(
        "open_clip_model.safetensors",
        to_open_clip,
        lambda theirs, _: from_open_clip(theirs),
        _open_clip_files,
        'open_clip.create_model("local-dir:{}")',
    ),
    "transformers": ExportFormat(
        "model.safetensors",
        to_transformers,
        from_transformers,
        _transformers_files,
        'transformers.CLIPModel.from_pretrained("{}")',
    ),
}
