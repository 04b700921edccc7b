"""The pictures of docs/reports.md: a report in Chromium, wide and light, narrow and dark, from its top or a heading.

python docs/images/make_report.py demo_run/report/report.html
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from small_browser import Page, open_browser  # noqa: E402

# Name, width in pixels, colours, the heading it begins with, height in pixels.
PICTURES = (
    ("report_wide.png", 1280, "light", "", 1400),
    ("report_narrow.png", 400, "dark", "Retrieval, looked at", 1500),
)
COLOURS = 128


def take(page: Page, report: Path, width: int, colours: str, heading: str, height: int) -> Image.Image:
    """A part of the page as it looks."""
    page.show(report, width, colours)
    top = 0
    if heading:
        top = page.run(f"[...document.querySelectorAll('h2')].find(h => h.textContent === {heading!r}).offsetTop") - 16
    whole = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return whole.crop((0, top, width, min(top + height, whole.height)))


def main(report: Path) -> None:
    """Write all pictures beside this file."""
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as page:
        for name, width, colours, heading, height in PICTURES:
            picture = take(page, report, width, colours, heading, height)
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(HERE / name, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
