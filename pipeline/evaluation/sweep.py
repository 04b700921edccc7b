"""A sweep: checkpoints x data sets in one YAML file, for one command or one array of jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from formats.errors import UserError, did_you_mean
from formats.files import expand

_Location = Annotated[str, AfterValidator(expand)]
_Path = Annotated[Path, AfterValidator(lambda path: Path(expand(str(path))))]


class Sweep(BaseModel):
    """What `--sweep FILE` holds; paths as on the command line. What is said there too counts instead."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: list[_Location] = Field(default=[], min_length=1)
    data: list[_Path] = Field(default=[], min_length=1)
    output: _Path | None = None
    tasks: str | None = None
    batch_size: int | None = Field(default=None, gt=0)
    workers: int | None = Field(default=None, gt=0)
    tokenizer: _Location | None = None
    model: str | None = None
    mask_images: bool = False
    word_counts: _Location | None = None


def read_sweep(path: Path) -> dict[str, Any]:
    """The options that a sweep file sets; UserError that names the file and the key for what does not fit."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"sweep {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"sweep {path}: expected lines such as `checkpoint: [runs/a, runs/b]` and `data: [sets/x]`")
    try:
        return Sweep.model_validate(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = did_you_mean(key, list(Sweep.model_fields))
            raise UserError(f"sweep {path}: unknown key {key!r}{near}") from None
        raise UserError(f"sweep {path}: {key}: {first['msg']} (got {first['input']!r})") from None
