"""What an option is: its type, default and meaning, whether a stage or a continued run may change it, and who says so.

All of it stands at the option's field (pipeline/recipe.py); help, docs, stages and resuming read it from there.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict

from formats.files import expand

_Value = TypeVar("_Value")


class Change(enum.Enum):
    """Who may change an option after a run was begun."""

    STAGE = "stage"
    RESUME = "resume"


# An option, or all of a section, that may differ between stages; that the same run may continue with another value of.
PerStage = Annotated[_Value, Change.STAGE]
OnResume = Annotated[_Value, Change.RESUME]
# A path or a URL.
Location = Annotated[str, AfterValidator(expand)]

_NONE = ("", "none", "null", "~")
_WHOLE = re.compile(r"\d+(\.\d*)?[eE]\+?\d{1,2}|\d+\.0*")  # int() reads all others
_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Section(BaseModel):
    """A group of options; unknown ones are errors, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextLoader(yaml.SafeLoader):
    """Reads YAML and leaves every scalar but null as it is written: the type of an option says what its text means."""


TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a recipe."""

    section: str
    name: str
    kinds: tuple[Any, ...]
    default: Any
    description: str
    changes: frozenset[Change]

    @property
    def full_name(self) -> str:
        """`section.name`."""
        return f"{self.section}.{self.name}"

    def value_of(self, text: str | None) -> Any:
        """What a text means before it is checked: text, none, a whole number as `1e6`, or a list where it can be one.

        A text of None is YAML's null; no list is the empty one. Raises ValueError for a list that cannot be read.
        """
        if text is None or text.strip().lower() in _NONE:
            if self.default == ():
                return ()
            if text is None or type(None) in self.kinds:
                return None
        is_list = any(get_origin(kind) is tuple for kind in self.kinds)
        if is_list and text.lstrip().startswith("["):
            try:
                return yaml.load(text, TextLoader)
            except yaml.YAMLError:
                raise ValueError(f"{self.full_name}: {text!r} is no list such as [a, b]") from None
        if int in self.kinds and _WHOLE.fullmatch(text.strip()) and float(text).is_integer():
            return int(float(text))
        return [text] if is_list and str not in self.kinds else text

    def describe_default(self) -> str:
        """The default as a user would write it."""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if self.default is None:
            return "none"
        return "[]" if self.default == () else f"{self.default}"


@cache
def options_of(recipe: type[BaseModel]) -> dict[str, Option]:
    """Every option of a recipe by its full name, in order; `stages`, which has the options of all sections, is none."""
    found = {}
    for section, field in recipe.model_fields.items():
        kind: Any = field.annotation
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            fields = [
                (f.name, hints[f.name], f.default, f.metadata["description"], ()) for f in dataclasses.fields(kind)
            ]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = [
                (name, f.annotation, f.default, f.description, tuple(f.metadata))
                for name, f in kind.model_fields.items()
            ]
        else:
            continue
        for name, annotation, default, description, metadata in fields:
            changes = {item for item in (*field.metadata, *metadata) if isinstance(item, Change)}
            option = Option(section, name, _kinds(annotation), default, description or "", frozenset(changes))
            found[option.full_name] = option
    return found


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of which a value may be, without what is annotated."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for part in get_args(annotation) for kind in _kinds(part))
    return (annotation,)


def read_values(fields: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """Nested values as YAML or the command line has them, each text as its option reads it; of stages too."""
    read: dict[str, Any] = {}
    for section, values in fields.items():
        if section == "stages" and isinstance(values, list | tuple):
            read[section] = [read_values(stage, options) if isinstance(stage, dict) else stage for stage in values]
        elif isinstance(values, dict):
            read[section] = {
                key: options[f"{section}.{key}"].value_of(value)
                if isinstance(value, str | None) and f"{section}.{key}" in options
                else value
                for key, value in values.items()
            }
        else:
            read[section] = values
    return read


def merge_stages(
    recipe: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], options: Mapping[str, Option]
) -> list[tuple[str, dict[str, Any]]]:
    """(name, whole recipe without stages) of each stage; raises ValueError for names and options that cannot be.

    A stage is trained from the final weights of the one before, with an optimiser and a schedule of its own. What
    identifies the run (model, samples, tokenizer, seed, output) cannot differ between stages.
    """
    shared = {section: fields for section, fields in recipe.items() if section != "stages"}
    merged: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, start=1):
        name = stage.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in merged:
            raise ValueError(f"stage {number} needs a name of its own, of letters, digits, - and _ (got {name!r})")
        changes = {section: fields for section, fields in stage.items() if section != "name"}
        _check_changes(name, changes, options)
        merged[name] = {
            section: {**shared.get(section, {}), **changes.get(section, {})} for section in shared | changes
        }
        if "epochs" in changes.get("train", {}):  # a stage's length is the stage's: no max_steps of the recipe cuts it
            merged[name]["train"]["max_steps"] = changes["train"].get("max_steps")
    return list(merged.items())


def _check_changes(name: str, changes: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """Options that nobody knows are found later, with all others."""
    for section, fields in changes.items():
        if section == "stages":
            raise ValueError(f"stage {name} cannot change stages: a stage has none of its own")
        if not isinstance(fields, dict):
            raise ValueError(f"stage {name}: expected `key: value` lines under {section} (got {fields!r})")
        for key in fields:
            option = options.get(f"{section}.{key}")
            if option is not None and Change.STAGE not in option.changes:
                may = [o.name for o in options.values() if o.section == section and Change.STAGE in o.changes]
                raise ValueError(
                    f"stage {name} cannot change {option.full_name}: it is the same in all stages; "
                    f"of {section} a stage may change {', '.join(may) or 'nothing'}"
                )


def find_stage(stages: object, name: str) -> dict[str, Any]:
    """The named stage of a recipe file's `stages`; raises ValueError if there is none."""
    named = (
        {stage.get("name"): stage for stage in stages if isinstance(stage, dict)} if isinstance(stages, list) else {}
    )
    if name not in named:
        known = ", ".join(map(str, named)) or "this recipe has none"
        raise ValueError(f"no stage {name!r}: {known}")
    return named[name]


def describe_options(options: Mapping[str, Option]) -> str:
    """Every option with its default and meaning, one line each, for `--help`."""
    lines = ["  stages: a list of diffs over those marked S, trained in turn (docs/training.md)"]
    for name, option in options.items():
        marks = "".join(change.name[0] for change in Change if change in option.changes)
        lines.append(f"  {marks:<2} {name}={option.describe_default()}".ljust(46) + f" {option.description}")
    return "\n".join(lines)


def options_table(options: Mapping[str, Option]) -> str:
    """The same as a Markdown table, for docs/options.md."""
    lines = ["| option | default | | stage | resumed |", "|---|---|---|---|---|"]
    for name, option in options.items():
        default, meaning = option.describe_default(), option.description.replace("|", "\\|")
        may = " | ".join("yes" if change in option.changes else "" for change in Change)
        lines.append(f"| `{name}` | {f'`{default}`' if default else ''} | {meaning} | {may} |")
    return "\n".join(lines)
