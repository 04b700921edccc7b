"""Stages of a recipe: what each changes, merged with what all share. Plain nested values in and out.

A stage is trained from the final weights of the one before, with an optimiser and a schedule of its own. What
identifies the run (model, data, tokenizer, seed, output) cannot differ between stages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Options that a stage may set, by section; None: all of the section's.
_MAY_DIFFER: dict[str, tuple[str, ...] | None] = {
    "model": ("image_size",),
    "data": ("crop_min_area",),
    "masking": None,
    "text_masking": ("strategy", "max_tokens", "frequency_threshold"),
    "loss": ("exchange", "kernel", "tile_size", "cache_gradients"),
    "optimizer": None,
    "train": (
        "epochs",
        "max_steps",
        "global_batch_size",
        "micro_batch_size",
        "activation_checkpointing",
        "compile",
        "log_every_steps",
        "save_every_steps",
        "save_every_minutes",
    ),
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def merge_stages(recipe: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(name, whole recipe without stages) of each stage; raises ValueError for names and options that cannot be."""
    shared = {section: fields for section, fields in recipe.items() if section != "stages"}
    merged: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, start=1):
        name = stage.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in merged:
            raise ValueError(f"stage {number} needs a name of its own, of letters, digits, - and _ (got {name!r})")
        changes = {section: fields for section, fields in stage.items() if section != "name"}
        _check_changes(name, changes)
        merged[name] = {section: {**fields, **changes.get(section, {})} for section, fields in shared.items()}
        if "epochs" in changes.get("train", {}):  # a stage's length is the stage's: no max_steps of the recipe cuts it
            merged[name]["train"]["max_steps"] = changes["train"].get("max_steps")
    return list(merged.items())


def find_stage(stages: object, name: str) -> dict[str, Any]:
    """The named stage of a recipe file's `stages`; raises ValueError if there is none."""
    named = (
        {stage.get("name"): stage for stage in stages if isinstance(stage, dict)} if isinstance(stages, list) else {}
    )
    if name not in named:
        known = ", ".join(map(str, named)) or "this recipe has none"
        raise ValueError(f"no stage {name!r}: {known}")
    return named[name]


def _check_changes(name: str, changes: Mapping[str, Any]) -> None:
    for section, fields in changes.items():
        if section not in _MAY_DIFFER:
            raise ValueError(f"stage {name} cannot change {section}; it may change {', '.join(_MAY_DIFFER)}")
        if not isinstance(fields, dict):
            raise ValueError(f"stage {name}: expected `key: value` lines under {section} (got {fields!r})")
        allowed = _MAY_DIFFER[section]
        for key in fields:
            if allowed is not None and key not in allowed:
                raise ValueError(
                    f"stage {name} cannot change {section}.{key}: it is the same in all stages; "
                    f"of {section} a stage may change {', '.join(allowed)}"
                )
