"""Reading recipes: by name or path, over their bases, with overrides; every mistake is one line.

A recipe is a YAML file of sections; `base: NAME` makes it a diff over another one. `section.key=value` on the command
line has the last word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import yaml
from pydantic import ValidationError

from formats.errors import UserError, did_you_mean, nearest_of
from formats.files import expand
from pipeline.recipe import Recipe
from pipeline.recipe_options import TextLoader, find_stage, merge_stages, options_of, read_values

RECIPES_DIRECTORY = Path(__file__).parent / "recipes"
OPTIONS = options_of(Recipe)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (pipeline/recipes/) or path and apply `section.key=value` overrides.

    Raises UserError in one line: unknown names with the nearest valid one, wrong types with what was expected.
    """
    fields = _read_with_bases(name_or_path, seen=())
    for override in overrides:
        _apply_override(fields, override)
    return parse_recipe(fields, name_or_path)


def parse_recipe(fields: dict[str, Any], source: str) -> Recipe:
    """Check nested plain values, and what its stages make of them; a text is read as its option's type says.

    Raises UserError that names the source, the stage, the key and the expectation.
    """
    try:
        recipe = _validate(read_values(fields, OPTIONS), source)
        merged = merge_stages(recipe.model_dump(), recipe.stages, OPTIONS)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    stages = []
    for changes, (name, whole) in zip(recipe.stages, merged, strict=True):
        checked = _validate(whole, f"{source}: stage {name}").model_dump()
        values = {
            section: {key: checked[section][key] for key in changes[section]}
            for section in changes
            if section != "name"
        }
        stages.append({"name": name, **values})
    return recipe.model_copy(update={"stages": tuple(stages)})


def _validate(fields: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise UserError(f"{source}: {_unknown_key(first['loc'])}") from None
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        where = f"{source}: {key}" if key else source
        raise UserError(f"{where}: {message}{got}") from None


def _read_with_bases(name_or_path: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name_or_path)
    if path in seen:
        raise UserError(f"recipe {path}: its bases lead back to itself")
    fields = _read_sections(str(path))
    base = fields.pop("base", None)
    if base is None:
        return fields
    beside = path.parent / str(base)
    merged = _read_with_bases(str(beside) if beside.exists() else str(base), (*seen, path))
    _merge(merged, fields)
    return merged


def _read_sections(location: str) -> dict[str, Any]:
    try:
        with fsspec.open(location, "r", encoding="utf-8-sig") as file:
            fields = yaml.load(file.read(), TextLoader)
    except (
        OSError,
        ValueError,
        ImportError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # ValueError: no UTF-8, no such protocol
        raise UserError(f"recipe {location} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields or {}, dict):
        raise UserError(f"recipe {location}: expected sections such as `model:` with `key: value` lines under them")
    return fields or {}


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(expand(name_or_path))
        if not path.exists():
            raise UserError(f"no recipe at {path}")
        return path.resolve()
    known = sorted(path.stem for path in RECIPES_DIRECTORY.glob("*.yaml"))
    if name_or_path not in known:
        raise UserError(f"no recipe {name_or_path!r}{nearest_of(name_or_path, known)}")
    return RECIPES_DIRECTORY / f"{name_or_path}.yaml"


def _merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _apply_override(fields: dict[str, Any], override: str) -> None:
    """Set `section.key=value`, or `stages.NAME.section.key=value` in the named stage."""
    path, separator, text = override.partition("=")
    *stage, section, key = path.split(".") if "." in path else ("", path, "")
    if not separator or not key or (stage and (len(stage) != 2 or stage[0] != "stages")):
        raise UserError(
            f"cannot read {override!r}: overrides look like section.key=value, e.g. optimizer.lr=1e-3, "
            "or stages.NAME.section.key=value"
        )
    if text.encode("utf-8", "ignore").decode() != text:
        raise UserError(f"{override!a} is not UTF-8: write it so, or name another path")
    try:
        target = find_stage(fields.get("stages"), stage[1]) if stage else fields
    except ValueError as error:
        raise UserError(f"{override}: {error}") from None
    _merge(target, {section: {key: text}})


def _unknown_key(location: tuple[int | str, ...]) -> str:
    *sections, key = (str(part) for part in location)
    known = [name for name in OPTIONS if not sections or name.startswith(f"{sections[0]}.")]
    if not sections:
        known = list(Recipe.model_fields)
    full = ".".join([*sections, key])
    return f"unknown option {full!r}{did_you_mean(full, known)}"


def read_recipe_file(path: str) -> Recipe:
    """A run directory's recipe.yaml, resolved already; any fsspec URL. Raises UserError for what is none."""
    return parse_recipe(_read_sections(path), path)
