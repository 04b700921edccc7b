"""Templates of DeepSpeed configurations, read and checked: what DeepSpeed ignores or fails on is refused in a line."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError

from formats.errors import UserError, did_you_mean

TEMPLATES_DIRECTORY = Path(__file__).resolve().parents[3] / "ds_configs"

# What a template must leave to the recipe, so that a number is said in one place only.
_RECIPE_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
# Blocks that DeepSpeed reads key by key.
_BLOCKS = ("torch_autocast", "data_types", "activation_checkpointing", "checkpoint", "flops_profiler")


def read_template(template: str) -> dict[str, Any]:
    """A template of ds_configs/ by name, or a JSON file by path; raises UserError for one that cannot be used."""
    is_path = template.endswith(".json") or "/" in template
    path = Path(template) if is_path else TEMPLATES_DIRECTORY / f"{template}.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = sorted(path.stem for path in TEMPLATES_DIRECTORY.glob("*.json"))
        near = did_you_mean(template, known)
        raise UserError(
            f"no DeepSpeed config {template!r}{near}; known: {', '.join(known)}, or give the path of a JSON file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    return copy.deepcopy(_parse_template(text, str(path)))


@cache
def _parse_template(text: str, source: str) -> dict[str, Any]:
    """A template as JSON, checked by DeepSpeed itself; raises UserError that names the key."""
    try:
        config: Any = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f'{source}: a DeepSpeed config is an object, such as {{"zero_optimization": {{"stage": 1}}}}')
    doubled = [key for key in _RECIPE_KEYS if key in config]
    if doubled:
        raise UserError(f"{source}: remove {', '.join(doubled)}: the recipe sets batch sizes, clipping and optimizer")
    for key, value in _leaves(config):
        if value == "auto":
            raise UserError(
                f'{source}: {key}: "auto" is filled in by transformers\' Trainer alone: give a value, or leave the key '
                "out for DeepSpeed's default"
            )
    _check_keys(config, source)
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a key that comes twice, of which Python's reader would take the last."""
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice: keep one")
    return read


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    else:
        yield key, value


class _Asked(dict[str, Any]):
    """A configuration that keeps the keys it is asked for, at all levels: what DeepSpeed never asks for, it ignores."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({key: _Asked(value) if isinstance(value, dict) else value for key, value in config.items()})
        self.asked: dict[Any, Any] = {}  # and the default that DeepSpeed has, if it says one

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As ever."""
        self.asked.pop(key, None)  # the last one asked for comes last
        self.asked[key] = default
        return super().get(key, default)

    def keys(self) -> Any:
        """For `key in config.keys()`."""
        return self


def _check_keys(config: dict[str, Any], source: str) -> None:
    """Raise UserError for keys that DeepSpeed does not know, or no longer, and values that it does not take."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models: dict[str, type[BaseModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for block in (*models, "torch_autocast", "data_types"):
        if not isinstance(config.get(block, {}), dict):
            raise UserError(f"{source}: {block} is an object of options, not {json.dumps(config[block])}")
        if not isinstance(config.get(block, {}).get("enabled", True), bool):
            raise UserError(f"{source}: {block}.enabled is true or false, not {json.dumps(config[block]['enabled'])}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage: ZeRO has the stages 0 to 3 (got {json.dumps(stage)})")
    for block, model in models.items():
        _check_block(model, config.get(block, {}), f"{source}: {block}")
    precisions = [key for key in ("bf16", "fp16", "torch_autocast") if config.get(key, {}).get("enabled")]
    if len(precisions) > 1:
        raise UserError(f"{source}: a DeepSpeed config turns on {' and '.join(precisions)}: keep one")
    read = _Asked(config | {"train_micro_batch_size_per_gpu": 1})
    try:
        for at, dtype in config.get("data_types", {}).items():
            if at.endswith("_dtype") and dtype is not None:
                read.get("data_types")
                DtypeEnum(dtype)
        DeepSpeedConfig(read)
    except Exception as error:
        at, why = [*read.asked][-1], " ".join(str(error).split())
        raise UserError(f"{source}: DeepSpeed does not take what {at} says: {why}") from error
    for name, block in [("", read), *((f"{name}.", read.get(name)) for name in _BLOCKS)]:
        for key in block or {}:
            if key not in block.asked:
                near = did_you_mean(key, block.asked)
                if key in DeepSpeedZeroConfig.model_fields:
                    near = ": it belongs into zero_optimization"
                raise UserError(f"{source}: unknown key {name + key!r}{near}")
            kind = _kind_of(block.asked[key])
            if kind and block[key] is not None and _kind_of(block[key]) != kind:
                raise UserError(f"{source}: {name + key}: {kind}, not {json.dumps(block[key])}")
    if "bfloat16" in config:
        raise UserError(f"{source}: bfloat16 is an old name: write bf16")


def _kind_of(value: Any) -> str:
    """What a user may write in place of a default; empty if that does not say."""
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else ""


def _check_block(model: type[BaseModel], block: dict[str, Any], source: str) -> None:
    try:
        model(**block)
    except ValidationError as error:
        first = error.errors()[0]
        *outer, last = map(str, first["loc"] or ("",))
        if first["type"] == "extra_forbidden":
            for name in outer:  # the model in which the key was looked for
                kinds = get_args(model.model_fields[name].annotation)
                model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
            known = [field.alias or name for name, field in model.model_fields.items()]
            raise UserError(f"{source}: unknown key {'.'.join([*outer, last])!r}{did_you_mean(last, known)}") from None
        where, message = ".".join(filter(None, (source, *outer, last))), first["msg"].removeprefix("Value error, ")
        got = f" (got {json.dumps(first['input'])})" if first["loc"] else ""
        raise UserError(f"{where}: {message}{got}") from None
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if name in block and isinstance(extra, dict) and extra.get("deprecated"):
            raise UserError(f"{source}: {name} is an old name: write {extra['new_param']}")
