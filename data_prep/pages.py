"""HTML pages that need no other file: templates with the style and the pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from formats.files import write_atomically

_TEMPLATES = Path(__file__).parent / "templates"


def write_html(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Fill in one of data_prep/templates; everything that is not markup is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    write_atomically(path, environment.get_template(template).render(css=css, **content))


def data_uri(data: bytes, media_type: str) -> str:
    """A picture as an address that contains it."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
