"""The report in a real browser: no network, no errors, readable at both widths, tables that sort."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_material import HOSTILE, result_of, write_retrieval_set, write_run
from small_browser import CHROMIUM, Page, open_browser
from test_result_pictures import write_classification_output, write_retrieval_output

from pipeline import mask_preview, report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

RECALLS = [f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything on it, names that are markup included."""
    directory = tmp_path_factory.mktemp("report")
    runs = []
    for index, name in enumerate(("alpha", "beta", "gamma")):
        recalls = dict.fromkeys(RECALLS, (0.2, 0.3, 0.1)[index])
        results = [result_of(name, "flickr8k", recalls, step=step) for step in (10, 20)]
        results += [result_of(name, HOSTILE, {"acc1": 0.5 + index / 10}), result_of(name, "cifar10", {"acc1": 0.4})]
        runs.append(write_run(directory / name, results, seed=index, strategy=("none", "random", "cluster")[index]))
    output = directory / "alpha" / "evaluation"
    write_retrieval_output(directory / "pairs", output)
    write_classification_output(directory / "classes", output, [HOSTILE, "a_$b$", "third"])
    write_classification_output(directory / "many", output, [f"class {index}" for index in range(30)])
    images = str(directory / "pairs")
    report.main([*map(str, runs), "--output", str(directory / "out"), "--images", images])
    return directory / "out" / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def check_quiet(page: Page) -> None:
    """Nothing was asked of the network, nothing was refused, nothing went wrong."""
    addresses = [request["request"]["url"] for request in page.methods("Network.requestWillBeSent")]
    assert all(address.startswith(("file:", "data:")) for address in addresses)
    assert len([address for address in addresses if address.startswith("file:")]) == 1
    assert page.methods("Runtime.exceptionThrown") == []
    assert page.methods("Runtime.consoleAPICalled") == []
    assert page.methods("Log.entryAdded") == []


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_fits_and_is_quiet(page: Page, page_file: Path, width: int, colours: str) -> None:
    page.show(page_file, width, colours)
    check_quiet(page)
    assert page.run("innerWidth") == width
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("[...document.images].filter(image => !(image.complete && image.naturalWidth)).length") == 0
    # no text runs out of its card
    outside = "[...document.querySelectorAll('.card')].filter(card => card.scrollWidth > card.clientWidth).length"
    assert page.run(outside) == 0
    with Image.open(io.BytesIO(page.screenshot(whole=False))) as image:
        pixels = np.asarray(image.convert("L"))
    assert (np.median(pixels) > 200) == (colours == "light")
    assert pixels.std() > 5


def edge(page: Page, selector: str) -> tuple[float, float]:
    """How much the right edge of a part that scrolls differs from 30 pixels further left, and how many are hidden."""
    part = f"document.querySelector({selector!r})"
    page.run(f"{part}.scrollIntoView({{block: 'center'}})")
    left, top, width, height = page.run(f"(r => [r.left, r.top, r.width, r.height])({part}.getBoundingClientRect())")
    with Image.open(io.BytesIO(page.screenshot(whole=False))) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)[
            int(top) : int(top + height), int(left) : int(left + width)
        ]
    hidden = page.run(f"{part}.scrollWidth - {part}.clientWidth")
    # of each kind of column the rows without letters: their median
    return float(np.abs(np.median(pixels[:, -3:]) - np.median(pixels[:, -34:-30]))), hidden


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_table_that_is_cut_off_shows_it(page: Page, page_file: Path, colours: str) -> None:
    page.show(page_file, 400, colours)
    shade, hidden = edge(page, "[aria-label=Retrieval]")
    assert hidden > 100
    assert shade > 20
    page.run("document.querySelector('[aria-label=Retrieval]').scrollTo(1e6, 0)")
    assert edge(page, "[aria-label=Retrieval]")[0] < 8
    page.show(page_file, 1280, colours)
    shade, hidden = edge(page, "[aria-label=Retrieval]")
    assert hidden == 0
    assert shade < 8


@pytest.mark.parametrize("width", [1280, 400])
def test_it_begins_with_what_was_run_and_how_it_did(page: Page, page_file: Path, width: int) -> None:
    page.show(page_file, width, "light")
    assert page.run("document.querySelector('h1').textContent") == "alpha, beta, gamma"
    links = page.run(
        "[...document.querySelectorAll('nav a')].map(link => [link.getAttribute('href'), link.textContent])"
    )
    headings = page.run("[...document.querySelectorAll('h2')].map(head => ['#' + head.id, head.textContent])")
    assert links == headings
    assert [heading for _, heading in headings[:2]] == ["What was run", "How it did"]
    first = page.run("[...document.querySelectorAll('.facts tbody th')].map(head => head.textContent)")
    assert first[:2] == ["model", "masking"]
    loss = page.run("[...document.querySelectorAll('h3')].findIndex(head => head.textContent === 'Loss')")
    assert loss == 0


def test_charts_are_dark_on_a_dark_page(page: Page, page_file: Path) -> None:
    shown = {}
    for colours in ("light", "dark"):
        page.show(page_file, 1280, colours)
        shown[colours] = page.run("[...document.querySelectorAll('picture img')].map(image => image.currentSrc)")
    assert len(shown["light"]) > 3
    assert not set(shown["light"]) & set(shown["dark"])


def test_a_masked_picture_stays_beside_its_original(page: Page, tmp_path: Path) -> None:
    write_retrieval_set(tmp_path / "pairs", [["one"], ["two"]])
    mask_preview.main([str(tmp_path / "pairs"), "--output", str(tmp_path / "masks.html"), "--show", "steps"])
    page.show(tmp_path / "masks.html", 400, "light")
    check_quiet(page)
    assert page.run("document.documentElement.scrollWidth") <= 400
    box = "(figure => (r => [r.left, r.top, r.right])(figure.getBoundingClientRect()))"
    figures = "document.querySelector('.pictures').querySelectorAll('figure')"
    count = page.run(f"{figures}.length")
    assert count == 11
    for shown in range(1, count):
        page.run(f"(row => row.scrollLeft = {shown - 1} * 148)(document.querySelector('.pictures'))")
        original, masked = page.run(f"[0, {shown}].map(index => {box}({figures}[index]))")
        assert original[1] == masked[1]
        assert 0 <= original[0] < original[2] <= masked[0] + 1
        assert masked[2] <= 400
    words = page.run("[...document.querySelectorAll('.legend b')].map(word => word.textContent)")
    assert words == ["grey with lines", "colours", "frame", "blue to red"]


def shown_rows(page: Page) -> list[str]:
    """The labels of our rows in the retrieval table, as they stand."""
    heads = "[...document.querySelectorAll('[aria-label=Retrieval] .ours th')]"
    labels: list[str] = page.run(f"{heads}.map(head => head.firstChild.textContent.trim())")
    return labels


def test_tables_sort_by_mouse_and_keyboard(page: Page, page_file: Path) -> None:
    page.show(page_file, 1280, "light")
    before = shown_rows(page)
    head = "document.querySelectorAll('[aria-label=Retrieval] thead tr:last-child th')[1]"
    page.run(f"{head}.querySelector('button').click()")
    assert page.run(f"{head}.getAttribute('aria-sort')") == "descending"
    assert shown_rows(page) == ["beta", "beta", "alpha", "alpha", "gamma", "gamma"]
    page.run(f"{head}.querySelector('button').focus()")
    page.press("Enter")
    assert page.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    assert shown_rows(page) == ["gamma", "gamma", "alpha", "alpha", "beta", "beta"]
    kinds = page.run("[...document.querySelectorAll('[aria-label=Retrieval] tbody tr')].map(row => row.className)")
    assert kinds == ["ours"] * 6 + ["published"] * 6 + ["chance"]
    page.press("Enter")
    assert page.run(f"{head}.hasAttribute('aria-sort')") is False
    assert shown_rows(page) == before
    check_quiet(page)


def test_markup_in_names_is_text_and_other_scripts_are_refused(page: Page, page_file: Path) -> None:
    page.show(page_file, 1280, "light")
    assert HOSTILE in page.run("document.body.innerText.replaceAll('\\u00a0', ' ')")
    assert page.run("document.scripts.length") == 1
    page.run("script = document.createElement('script'); script.textContent = 'ran = 1'; document.body.append(script)")
    assert page.run("window.ran") is None
    assert any("Content Security Policy" in entry["entry"]["text"] for entry in page.methods("Log.entryAdded"))


def test_page_is_not_large(page_file: Path) -> None:
    assert page_file.stat().st_size < 3_000_000
