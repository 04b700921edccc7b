"""Links and anchors of the pages lead somewhere, README.md leads to all pages, and benchmarks are named as they are."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "ds_configs", "slurm")),
    ]
)
BENCHMARKS = ROOT / "benchmarks"


def prose(text: str) -> str:
    """A page without its blocks of code between fences."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a page."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(
            " ", "-"
        )
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def dead_links(text: str, folder: Path) -> list[str]:
    """The links of a page in that folder that lead nowhere."""
    dead = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = folder / path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text() if path else text)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page.read_text(), page.parent) == []


def test_a_dead_link_is_noticed() -> None:
    text = "# A page: `code`, twice\n\n# Twice\n\n# Twice\n\n[a](#a-page-code-twice) [b](#twice-1) ![c](README.md)"
    assert dead_links(text, ROOT) == []
    assert dead_links("[a](#b) [c](README.md#d) [e](f.md) [g](https://h)", ROOT) == ["#b", "README.md#d", "f.md"]


def test_the_readme_leads_to_every_page() -> None:
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} - set(links((ROOT / "README.md").read_text())) == {
        "README.md"
    }


def test_what_is_named_of_benchmarks_exists() -> None:
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"\bbenchmarks/[\w/]+\.(?:py|sh|json)\b", text):
            assert (ROOT / path).exists(), (page, path)


def test_every_benchmark_is_listed() -> None:
    listed = (BENCHMARKS / "README.md").read_text()
    programs = [path for path in BENCHMARKS.rglob("*.py") if "__main__" in path.read_text()]
    assert [path.name for path in programs if not re.search(rf"\b{path.name}\b", listed)] == []
    assert [path.name for path in (BENCHMARKS / "results").glob("*.json") if f"`{path.stem}`" not in listed] == []
