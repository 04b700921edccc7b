"""open_clip's folder, read and written: `open_clip_config.json`; and OpenAI's files, whose shapes say what they are.

Source: open_clip's `CLIPVisionCfg`, `CLIPTextCfg`, `PreprocessCfg` and `build_model_from_openai_state_dict`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from model.config import CLIPConfig, Pool, TextConfig, VisionConfig
from model.packing import PIXEL_MEAN, PIXEL_STD
from pipeline.data.captions import TextEncoder
from pipeline.data.image_transform import Interpolation, Preprocessing, ResizeMode
from pipeline.foreign.byte_pairs import byte_pairs_of, is_clips_own, tokenizer_files
from pipeline.foreign.fields import per_channel, refuse_others, square, with_defaults

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
WEIGHTS_NAMES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_POOLS: dict[Pool, str] = {"class": "tok", "average": "avg"}
# Of OpenAI's vision transformers, whose heads are 64 wide: of images, of captions.
_OPENAI_WIDTHS = {(768, 512), (1024, 768)}
_OPENAI_HEAD_WIDTH = 64
# The weights whose shapes say which it is, and their dimensions.
_OPENAI_SHAPES = {"visual.conv1.weight": 4, "visual.positional_embedding": 2, "token_embedding.weight": 2}
_OPENAI_SHAPES |= {"positional_embedding": 2, "text_projection": 2}

# What is read, with open_clip's defaults.
_VISION: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "layers": 12,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "pool_type": "tok",
}
_TEXT = {"width": 512, "layers": 12, "heads": 8, "context_length": 77, "vocab_size": 49_408, "mlp_ratio": 4.0}
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias"}
_TOKENIZER = "hf_tokenizer_name"
# The only value of theirs that models here have.
_FIXED_VISION = {"pos_embed_type": "learnable", "block_type": "default"}
_FIXED_TEXT = {"pool_type": "argmax", "proj_type": "linear", "block_type": "default"}
# Of training, or of parts that refuse themselves.
_NO_MATTER = {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "pad_id", "eos_id"}
_NO_MATTER |= {"timm_pool", "timm_proj", "timm_drop", "timm_drop_path", "timm_model_pretrained"}
_NO_MATTER |= {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_NO_MATTER |= {"init_logit_scale", "nonscalar_logit_scale", "custom_text", "cast_dtype", "output_dict"}
# "random" is of training
_INTERPOLATIONS: dict[str, Interpolation] = {
    "bicubic": "bicubic",
    "random": "bicubic",
    "bilinear": "bilinear",
}


def read_config(content: Mapping[str, Any], name: str) -> CLIPConfig:
    """The model of an `open_clip_config.json`; ValueError, KeyError, … for what the models here do not have."""
    model = content["model_cfg"]
    refuse_others("model_cfg", model, _MODEL, {}, _NO_MATTER)
    refuse_others("vision_cfg", model["vision_cfg"], _VISION, _FIXED_VISION, _NO_MATTER)
    refuse_others("text_cfg", model["text_cfg"], {*_TEXT, _TOKENIZER}, _FIXED_TEXT, _NO_MATTER)
    vision, text = with_defaults(model["vision_cfg"], _VISION), with_defaults(model["text_cfg"], _TEXT)
    pool = next((ours for ours, theirs in _POOLS.items() if theirs == vision["pool_type"]), None)
    if pool is None or not isinstance(vision["layers"], int):
        raise ValueError("its image tower is no vision transformer with class or average pooling")
    activation: Any = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return CLIPConfig(
        name=name,
        embed_dim=model["embed_dim"],
        vision=VisionConfig(
            image_size=square("image_size", vision["image_size"]),
            patch_size=square("patch_size", vision["patch_size"]),
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision["head_width"],
            mlp_ratio=vision["mlp_ratio"],
            pool=pool,
            activation=activation,
        ),
        text=TextConfig(**text, eot_token_id=text["vocab_size"] - 1, activation=activation),
        init_logit_bias=model.get("init_logit_bias"),
    )


def tokenizer_name(content: Mapping[str, Any]) -> str | None:
    """The tokenizer of Hugging Face's that a model has, whose files open_clip looks for in its folder; None: CLIP's."""
    name: str | None = ((content.get("model_cfg") or {}).get("text_cfg") or {}).get(_TOKENIZER)
    return name or None


def read_preprocessing(content: Mapping[str, Any], size: int) -> Preprocessing:
    """How open_clip makes pixels of images for a model of this image size, which it takes whatever is said here."""
    fields = content.get("preprocess_cfg") or {}
    read = {"mean", "std", "interpolation", "resize_mode", "fill_color"}
    refuse_others("preprocess_cfg", fields, read, {"mode": "RGB"}, {"size"})
    interpolation = _INTERPOLATIONS.get(fields.get("interpolation") or "bicubic")
    resize_mode: Any = fields.get("resize_mode") or "shortest"
    fill = fields.get("fill_color") or 0
    if interpolation is None or resize_mode not in get_args(ResizeMode) or fill not in range(256):
        raise ValueError(f"its images cannot be resized here as preprocess_cfg says: {json.dumps(fields)}")
    return Preprocessing(
        size=size,
        resize_mode=resize_mode,
        interpolation=interpolation,
        fill=fill,
        mean=per_channel("mean", fields.get("mean") or list(PIXEL_MEAN)),
        std=per_channel("std", fields.get("std") or list(PIXEL_STD), positive=True),
    )


def openai_config(weights: Mapping[str, Tensor], name: str) -> CLIPConfig | None:
    """The model of one of OpenAI's files, all of which have QuickGELU; None if it is none of their sizes."""
    if not _OPENAI_SHAPES.keys() <= weights.keys():
        return None
    if any(weights[name].dim() != dimensions for name, dimensions in _OPENAI_SHAPES.items()):
        return None
    width, _, patch_size, _ = weights["visual.conv1.weight"].shape
    vocab_size, text_width = weights["token_embedding.weight"].shape
    if (width, text_width) not in _OPENAI_WIDTHS:
        return None
    grid_size = math.isqrt(weights["visual.positional_embedding"].shape[0] - 1)
    return CLIPConfig(
        name=name,
        embed_dim=weights["text_projection"].shape[1],
        vision=VisionConfig(
            image_size=grid_size * patch_size,
            patch_size=patch_size,
            width=width,
            layers=_layers(weights, "visual.transformer"),
            heads=width // _OPENAI_HEAD_WIDTH,
            activation="quick_gelu",
        ),
        text=TextConfig(
            width=text_width,
            layers=_layers(weights, "transformer"),
            heads=text_width // _OPENAI_HEAD_WIDTH,
            context_length=weights["positional_embedding"].shape[0],
            vocab_size=vocab_size,
            eot_token_id=vocab_size - 1,
            activation="quick_gelu",
        ),
    )


def _layers(weights: Mapping[str, Tensor], transformer: str) -> int:
    return sum(name.startswith(f"{transformer}.") and name.endswith(".ln_1.weight") for name in weights)


def text_files(config: CLIPConfig, encoder: TextEncoder) -> dict[str, str]:
    """What a folder has beside the weights; ValueError for a model that open_clip cannot hold."""
    if config.vision.pool not in _POOLS:
        raise ValueError(f"model.pool={config.vision.pool}, and open_clip's CLIP has class or average pooling only")
    if config.text.attention != "causal":
        raise ValueError(
            f"model.text_attention={config.text.attention}, and open_clip's CLIP, unless causal, lets captions see "
            "their padding: use it with pipeline/embed.py and evaluate.py"
        )
    content = {"model_cfg": model_cfg(config), "preprocess_cfg": _preprocess_cfg(config.vision.image_size)}
    if is_clips_own(byte_pairs_of(encoder)):
        return {CONFIG: json.dumps(content, indent=2) + "\n"}
    # open_clip has CLIP's own tokenizer, or lets transformers read the one in the folder
    content["model_cfg"]["text_cfg"][_TOKENIZER] = "."
    files = tokenizer_files(encoder, config.text.context_length)
    return {CONFIG: json.dumps(content, indent=2) + "\n", **files}


def _preprocess_cfg(size: int) -> dict[str, Any]:
    return {
        "size": size,
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def model_cfg(config: CLIPConfig) -> dict[str, Any]:
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
            "pool_type": _POOLS[vision.pool],
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
