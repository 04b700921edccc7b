"""The folder of a transformers `CLIPModel`, read and written: configuration and preprocessing.

Source: transformers' `CLIPConfig` and `CLIPImageProcessor`, whose defaults stand for what a file leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.errors import UserError
from model.config import CLIPConfig, TextConfig, VisionConfig
from model.packing import PIXEL_MEAN, PIXEL_STD
from pipeline.data.captions import TextEncoder
from pipeline.data.image_transform import Interpolation, Preprocessing, ResizeMode
from pipeline.foreign.byte_pairs import tokenizer_files
from pipeline.foreign.fields import UNREADABLE, per_channel, refuse_others, square, with_defaults

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_NAMES = (WEIGHTS, "pytorch_model.bin")
_PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
_LAYER_NORM_EPS = 1e-5
# What old configurations say of CLIP's end token, which is the last id all the same.
_OLD_EOS = 2

_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT |= {"max_position_embeddings": 77, "vocab_size": 49_408, "eos_token_id": 49_407}
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VISION |= {"image_size": 224, "patch_size": 32, "num_channels": 3}
_BOTH = {"hidden_act": "quick_gelu", "layer_norm_eps": _LAYER_NORM_EPS}
_PROCESSING = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(PIXEL_MEAN),
    "image_std": list(PIXEL_STD),
}
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_PROCESSORS_OF_DINOV2 = ("BitImageProcessor", "BitImageProcessorFast", "BitImageProcessorPil")  # they do the same
_KINDS = ("image_processor_type", "feature_extractor_type")
# How its images are handed over, and who else reads the file.
_NO_MATTER = {"processor_class", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping"}
_NO_MATTER |= {"_valid_processor_keys", "use_fast", "backend"}
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_config(content: Mapping[str, Any], name: str) -> CLIPConfig:
    """The model of a `config.json`; ValueError, KeyError, … for what the models here do not have."""
    if content.get("model_type") != "clip":
        raise ValueError(f"model_type is {content.get('model_type')}, not clip")
    vision, text = _tower(content, "vision_config", _VISION), _tower(content, "text_config", _TEXT)
    if vision["num_channels"] != 3:
        raise ValueError(f"its images have {vision['num_channels']} channels, not 3")
    eos = text["eos_token_id"]
    (eos,) = eos if isinstance(eos, list) else [eos]
    return CLIPConfig(
        name=name,
        embed_dim=with_defaults(content, {"projection_dim": 512})["projection_dim"],
        vision=VisionConfig(
            image_size=square("image_size", vision["image_size"]),
            patch_size=square("patch_size", vision["patch_size"]),
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
            activation=vision["hidden_act"],
        ),
        text=TextConfig(
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            context_length=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
            eot_token_id=text["vocab_size"] - 1 if eos == _OLD_EOS else eos,
            mlp_ratio=text["intermediate_size"] / text["hidden_size"],
            activation=text["hidden_act"],
        ),
    )


def _tower(content: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's fields; what old versions wrote as `NAME_dict` takes their place there too."""
    given = content.get(f"{name}_dict")
    fields = with_defaults((content.get(name) if given is None else given) or {}, {**defaults, **_BOTH})
    if fields["layer_norm_eps"] != _LAYER_NORM_EPS:
        raise ValueError(f"layer_norm_eps is {fields['layer_norm_eps']}, not {_LAYER_NORM_EPS}")
    return fields


def read_preprocessing(folder: Path, size: int) -> Preprocessing:
    """How a folder's processor makes pixels of images for a model of this image size; as CLIP's does if it has none.

    Raises UserError for what cannot be done here, and for two files that say different things.
    """
    found = {}
    for name, section in ((_PROCESSOR, "image_processor"), (IMAGE_PROCESSOR, None)):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            fields = content.get(section) if section else content
            if fields is not None:  # versions before 5 write only names of classes into the first
                found[name] = _preprocessing(fields, size)
        except UNREADABLE as error:
            raise UserError(f"{file} asks for images that cannot be made here: {error}") from error
    if len(set(found.values())) > 1:
        raise UserError(f"{' and '.join(found)} of {folder} differ: delete the one that the model was not trained with")
    return next(iter(found.values()), Preprocessing(size, floor_offsets=True))


def _preprocessing(given: Mapping[str, Any], size: int) -> Preprocessing:
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or _PROCESSORS[0]
    if kind not in (*_PROCESSORS, *_PROCESSORS_OF_DINOV2):
        raise ValueError(f"its processor is {kind}, not {_PROCESSORS[0]}")
    refuse_others("its processor", given, {*_PROCESSING, *_KINDS}, {}, _NO_MATTER)
    fields = with_defaults(given, _PROCESSING)
    for name in ("do_convert_rgb", "do_resize", "do_rescale"):
        if fields[name] is not True:
            raise ValueError(f"{name} is {fields[name]}")
    for name in ("do_center_crop", "do_normalize"):
        if not isinstance(fields[name], bool):
            raise ValueError(f"{name} is {fields[name]!r}, not true or false")
    if abs(255 * fields["rescale_factor"] - 1) > 1e-6 or fields["resample"] not in _RESAMPLE:
        raise ValueError(f"rescale_factor is {fields['rescale_factor']}, resample {fields['resample']}")
    mode, resized = _resize(fields["size"], fields["default_to_square"])
    if not fields["do_center_crop"] and mode == "shortest":
        raise ValueError("images are resized on the shorter side and not cropped: they are no squares")
    cropped = square("crop_size", fields["crop_size"]) if fields["do_center_crop"] else resized
    if cropped != size or resized < cropped:
        raise ValueError(f"images are resized to {resized} and cropped to {cropped}, and the model takes {size}")
    normalizes = fields["do_normalize"]
    return Preprocessing(
        size=size,
        resized=resized,
        resize_mode=mode,
        interpolation=_RESAMPLE[fields["resample"]],
        floor_offsets=True,
        mean=per_channel("image_mean", fields["image_mean"] if normalizes else 0),
        std=per_channel("image_std", fields["image_std"] if normalizes else 1, positive=True),
    )


def _resize(size: Any, default_to_square: bool) -> tuple[ResizeMode, int]:
    """What `size` means: a number or a shortest edge is the shorter side, a height and width both."""
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"}:
        return "shortest", square("size", size["shortest_edge"])
    if isinstance(size, int) and not default_to_square:
        return "shortest", square("size", size)
    return "squash", square("size", size)


def text_files(config: CLIPConfig, encoder: TextEncoder) -> dict[str, str]:
    """What a folder has beside the weights; ValueError for a model that transformers cannot hold."""
    if config.vision.pool != "class":
        raise ValueError(f"model.pool={config.vision.pool}, and transformers' CLIP has class pooling only")
    if config.text.attention != "causal":
        raise ValueError(
            f"model.text_attention={config.text.attention}, and transformers' CLIP is causal: use it with "
            "pipeline/embed.py and evaluate.py"
        )
    if config.init_logit_bias is not None:
        raise ValueError(
            "loss.kind=sigmoid, and transformers' CLIP has no logit bias: its probabilities would be wrong; export it "
            "with --format open_clip"
        )
    return {
        CONFIG: json.dumps(_config(config, encoder.start_token_id), indent=2) + "\n",
        IMAGE_PROCESSOR: json.dumps(_processing(config.vision.image_size), indent=2) + "\n",
        **tokenizer_files(encoder, config.text.context_length),
    }


def _config(config: CLIPConfig, start_token_id: int) -> dict[str, Any]:
    vision, text = config.vision, config.text
    # named in every part: a default would be quick_gelu, and 2 as end token selects another way of pooling
    shared = {"hidden_act": config.activation, "layer_norm_eps": _LAYER_NORM_EPS, "projection_dim": config.embed_dim}
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
            "bos_token_id": start_token_id,
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


def _processing(image_size: int) -> dict[str, Any]:
    """What evaluation does here, named in full."""
    size = {"shortest_edge": image_size}
    crop_size = {"height": image_size, "width": image_size}
    fields = {"image_processor_type": _PROCESSORS[0], **_PROCESSING, "size": size, "crop_size": crop_size}
    return {name: value for name, value in fields.items() if name != "default_to_square"}
