"""Pages that need no other file: templates filled in, with the style, the script and the pictures inside.

`templates/` has what all pages share: their frame (`page.html.j2`), their style and how a chart is shown.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_SHARED = Path(__file__).with_name("templates")


def render(template: Path, content: Mapping[str, Any]) -> str:
    """A template, filled in; in HTML everything that is not markup is escaped. A name that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _SHARED]),
        autoescape=template.name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["csp_hash"] = csp_hash
    environment.filters["md"] = _escape_markdown
    return environment.get_template(template.name).render(content)


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def csp_hash(text: str) -> str:
    """The name by which a page's Content-Security-Policy allows exactly this style or script, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _escape_markdown(text: str) -> str:
    for character in "\\|`*_<>[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
