"""Reading recipes: by name or path, over their bases, with overrides; every mistake is one line.

A recipe is a YAML file of sections; `base: NAME` makes it a diff over another one. `section.key=value` on the command
line has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import yaml
from pydantic import ValidationError

from formats.errors import UserError, did_you_mean, nearest_of
from pipeline.recipe import Recipe, Section
from pipeline.recipe_stages import find_stage, merge_stages

RECIPES_DIRECTORY = Path(__file__).parent / "recipes"


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (pipeline/recipes/) or path and apply `section.key=value` overrides.

    Raises UserError in one line: unknown names with the nearest valid one, wrong types with what was expected.
    """
    fields = _read_with_bases(name_or_path, seen=())
    for override in overrides:
        _apply_override(fields, override)
    return parse_recipe(fields, name_or_path)


def parse_recipe(fields: dict[str, Any], source: str) -> Recipe:
    """Check nested plain values, and what its stages make of them.

    Raises UserError that names the source, the stage, the key and the expectation.
    """
    recipe = _validate(fields, source)
    try:
        stages = merge_stages(recipe.model_dump(), recipe.stages)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    for name, merged in stages:
        _validate(merged, f"{source}: stage {name}")
    return recipe


def _validate(fields: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: {_unknown_key(first['loc'])}") from None
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        where = f"{source}: {key}" if key else source
        raise UserError(f"{where}: {message}{got}") from None


def _read_with_bases(name_or_path: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name_or_path)
    if path in seen:
        raise UserError(f"recipe {path}: its bases lead back to itself")
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise UserError(f"recipe {path}: expected sections such as `model:` with `key: value` lines under them")
    base = fields.pop("base", None)
    if base is None:
        return fields
    beside = path.parent / str(base)
    merged = _read_with_bases(str(beside) if beside.exists() else str(base), (*seen, path))
    _merge(merged, fields)
    return merged


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
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
    try:
        value = yaml.safe_load(text) if text else ""
        target = find_stage(fields.get("stages"), stage[1]) if stage else fields
    except ValueError as error:
        raise UserError(f"{override}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the value of {override!r}: {' '.join(str(error).split())}") from error
    _merge(target, {section: {key: value}})


def _unknown_key(location: tuple[int | str, ...]) -> str:
    *sections, key = (str(part) for part in location)
    known = [name for name, _ in _fields() if not sections or name.startswith(f"{sections[0]}.")]
    if not sections:
        known = list(Recipe.model_fields)
    full = ".".join([*sections, key])
    return f"unknown option {full!r}{did_you_mean(full, known)}"


def _fields() -> Iterator[tuple[str, Any]]:
    for section_name, section in Recipe.model_fields.items():
        section_type = section.annotation
        if not (isinstance(section_type, type) and issubclass(section_type, Section)):
            continue  # stages, which have the options of all other sections
        for name, field in section_type.model_fields.items():
            yield f"{section_name}.{name}", field


def describe_options() -> str:
    """Every option with its default and meaning, one line each, for `--help`."""
    lines = ["  stages: a list of diffs over these, trained in turn (docs/training.md)"]
    for name, field in _fields():
        default = "none" if field.default is None else repr(field.default) if field.default == "" else field.default
        lines.append(f"  {name}={default}".ljust(42) + f" {field.description}")
    return "\n".join(lines)


def read_recipe_file(path: str) -> Recipe:
    """A run directory's recipe.yaml, resolved already; any fsspec URL."""
    with fsspec.open(path, "r") as file:
        return parse_recipe(yaml.safe_load(file.read()), path)
