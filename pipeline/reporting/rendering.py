"""Templates become pages; everything that is not markup is escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parents[1] / "templates"


def render(template: str, content: dict[str, Any]) -> str:
    """One of the templates, filled in; a name that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["csp_hash"] = csp_hash
    environment.filters["md"] = _escape_markdown
    return environment.get_template(template).render(content)


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as an address that holds them, so that a page needs no other file."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def csp_hash(text: str) -> str:
    """The name by which a page's Content-Security-Policy allows exactly this style or script, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _escape_markdown(text: str) -> str:
    for character in "\\|`*_<>[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
