"""Class names and templates of common sets, for those that come without: class_names.yaml."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict

from pipeline.evaluation.known_sets import set_key


class ClassNames(BaseModel):
    """Of one set. `order` says whence the order of the classes, which is that of the labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: str
    templates: tuple[str, ...]
    classes: tuple[str, ...]


def class_names_of(name: str) -> ClassNames | None:
    """Of a set by any of its names, as a directory or CLIP_benchmark calls it; None if it is not in the list."""
    return all_class_names().get(set_key(name))


@cache
def all_class_names() -> dict[str, ClassNames]:
    """All sets of the list by their keys."""
    content = yaml.safe_load(files("pipeline.evaluation").joinpath("class_names.yaml").read_text(encoding="utf-8"))
    return {key: ClassNames.model_validate(fields) for key, fields in content.items()}
