"""The report in a real browser: no network, no errors, readable at both widths, tables that sort."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_material import HOSTILE, result_of, write_run
from small_browser import CHROMIUM, Page, open_browser
from test_result_pictures import write_classification_output, write_retrieval_output

from pipeline import report

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
