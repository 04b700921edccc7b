"""Rows that papers print: read from a file, checked, never computed with."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from formats.errors import UserError

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedTable(_Strict):
    """Figures by method, in percent, in the order of `columns`."""

    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]

    @model_validator(mode="after")
    def _has_whole_rows(self) -> PublishedTable:
        for method, figures in self.rows.items():
            if len(figures) != len(self.columns):
                raise ValueError(f"{method} has {len(figures)} figures for {len(self.columns)} columns")
        return self

    def figures(self, method: str) -> dict[str, float]:
        """A method's figures by column."""
        return dict(zip(self.columns, self.rows[method], strict=True))


class PublishedCost(_Strict):
    """A system's ImageNet top-1, in percent, and its training in GPU-hours."""

    system: str
    data: str
    imagenet: float
    gpu_hours: float
    source: str


class Published(_Strict):
    """Published tables by the name of their group; `methods`: training time relative to CLIP's."""

    source: str = ""
    methods: dict[str, float] = {}
    tables: dict[str, PublishedTable] = {}
    costs: tuple[PublishedCost, ...] = ()


def read_published(file: Path = PUBLISHED_FILE) -> Published:
    """The published rows of a file. Raises UserError if it is missing or has another form."""
    try:
        return Published.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read the published rows {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}, {where}: {first['msg']}; pipeline/reporting/published.yaml shows the form") from error
