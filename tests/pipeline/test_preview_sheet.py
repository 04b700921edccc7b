"""The sheet of a mask preview: its labels, colours and words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from preview_material import sheet_of, write_pictures

from formats.errors import UserError
from pipeline.reporting.masks.drawing import heat_map, outline, tint_clusters
from pipeline.reporting.masks.painter import paint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_labels_by_what_is_shown(folder: Path) -> None:
    def labels(show: str) -> list[str]:
        return [cell.label for cell in sheet_of(folder, ["random", "cluster", "pgs"], show).rows[0].cells]

    assert labels("masks") == ["original", "random", "cluster", "pgs"]
    assert labels("clusters") == [
        *["original", "random", "cluster: clusters", "cluster"],
        *["pgs: edges", "pgs: clusters", "pgs"],
    ]
    assert labels("steps") == [
        *["original", "random", "cluster: anchors", "cluster: similarity", "cluster: clusters", "cluster"],
        *["pgs: edges", "pgs: candidates", "pgs: similarity", "pgs: clusters", "pgs"],
    ]


def test_tint_outline_and_heat() -> None:
    grey_CSS = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    tinted = tint_clusters(grey_CSS, torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 1.0, 0.5, -0.2]), 16)
    first, second, weaker, none = (
        tinted[:, y : y + 16, x : x + 16].flatten(1).unique(dim=1) for y in (0, 16) for x in (0, 16)
    )
    assert first.shape == second.shape == weaker.shape == (3, 1)
    assert none.flatten().tolist() == [100, 100, 100]
    away = [(colour.float() - 100).abs().max() for colour in (first, weaker)]
    assert away[0] > 1.8 * away[1] > 20
    assert (first.float() - second.float()).abs().max() > 50

    framed = outline(grey_CSS, torch.tensor([1, 2]), 16) != grey_CSS
    assert framed.any(dim=0)[:16, 16:].any()
    assert not framed[:, :16, :16].any()
    assert not framed[:, 16:, 16:].any()
    assert not framed[:, 4:12, 20:28].any()  # the anchor itself is seen within its frame

    cold, middle, hot, below = (
        heat_map(grey_CSS, torch.tensor([0.0, 0.3, 1.0, -1.0]), 0.3, 16)[:, ::16, ::16].flatten(1).T
    )
    assert int(cold[2]) - int(cold[0]) > 80
    assert int(hot[0]) - int(hot[2]) > 80
    assert middle.unique().numel() == 1
    assert torch.equal(cold, below)


def shows_text(picture: Image.Image, text: str, ink: str, font: ImageFont.FreeTypeFont) -> bool:
    """Whether the text, drawn anew, is somewhere in the picture, pixel by pixel."""
    paper = Image.new("RGB", (900, 60), "white")
    ImageDraw.Draw(paper).text((5, 5), text, ink, font)
    drawn = np.asarray(paper.crop(ImageChops.invert(paper).getbbox()))
    pixels, (height, width, _) = np.asarray(picture), drawn.shape
    for top in range(pixels.shape[0] - height + 1):
        row, start = pixels[top].tobytes(), -1
        while (start := row.find(drawn[0].tobytes(), start + 1)) >= 0:
            left = start // 3
            if np.array_equal(pixels[top : top + height, left : left + width], drawn):
                return True
    return False


def test_words_of_the_sheet_are_in_its_picture(folder: Path) -> None:
    sheet = sheet_of(folder, ["random", "cluster"], "masks")
    picture = paint(sheet)
    font = ImageFont.load_default(19)  # pictures are drawn at 256 pixels, four times their size
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert sheet.rows[0].cells[2].note != sheet.rows[1].cells[2].note
    for text in ("original", "random", "cluster", *map(str, sheet.summaries)):
        assert shows_text(picture, text, "#1c2129", font), text
    for text in ("Patches of 8 x 8 on images of 64 x 64;", *(cell.note for row in sheet.rows for cell in row.cells)):
        assert shows_text(picture, text, "#5b6472", font), text
    assert not shows_text(picture, "clusters", "#1c2129", font)


def test_a_sheet_that_is_too_large(folder: Path) -> None:
    sheet = sheet_of(folder, ["random"])
    with pytest.raises(UserError, match=r"a sheet of .* pixels is too large: take fewer --images"):
        paint(replace(sheet, rows=sheet.rows * 100))
