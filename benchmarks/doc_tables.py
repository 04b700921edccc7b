"""Tables of docs/ that a benchmark writes: between `<!-- NAME -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def marked(name: str, text: str) -> str:
    """A text with its marks, as it stands in a page."""
    return f"<!-- {name} -->\n{text}\n<!-- end of {name} -->\n"


def replace(page: Path, name: str, text: str) -> None:
    """Put a text where the page has the marks; raises ValueError where it has none."""
    before, begin, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    if not (begin and end):
        raise ValueError(f"{page} has no place for {name}")
    page.write_text(f"{before}{marked(name, text)}{after}")
