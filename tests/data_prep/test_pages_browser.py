"""The pages of data-prep in a real browser: no errors, nothing from elsewhere, charts in the page's colours."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_browser import CHROMIUM, open_browser
from test_download_report import write_download

from data_prep.__main__ import main

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


def test_the_page_of_a_download(tmp_path: Path) -> None:
    data = tmp_path / "shards"
    data.mkdir()
    failed = [(f"http://{'long' * 9}{i}.example/{i}.jpg", "4xx", "HTTP 404 " + "x" * 90) for i in range(5)]
    write_download(data, [("http://a.example/1.jpg", "ok", None), *failed])
    assert main(["report", str(data)]) == 0
    charts = {}
    with open_browser(tmp_path / "profile") as page:
        for width in (1280, 400):
            for colours in ("light", "dark"):
                page.show(data / "download.html", width, colours)
                assert page.run("document.documentElement.scrollWidth") <= width
                assert page.methods("Log.entryAdded") == []
                assert page.methods("Runtime.exceptionThrown") == []
                charts[colours] = page.run("[...document.images].map(image => image.currentSrc)")
                assert page.run("[...document.querySelectorAll('.bar rect')].every(bar => bar.getBBox().width > 0)")
    assert len(charts["light"]) == 4
    assert not set(charts["light"]) & set(charts["dark"])
