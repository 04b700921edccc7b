"""A preview sheet as one picture, its text drawn with Pillow's own font."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from formats.errors import UserError
from pipeline.reporting.masks.sheet import Sheet

_PAPER, _INK, _SOFT_INK = "#ffffff", "#1c2129", "#5b6472"
# A side that JPEG can hold, and a size that memory can.
_MAX_SIDE, _MAX_PIXELS = 65_000, 200_000_000
# Letters grow with the pictures: a large sheet is looked at from further away.
_PICTURE_PER_FONT, _MIN_FONT = 13, 16


def paint(sheet: Sheet) -> Image.Image:
    """Labels above the columns, a note under each picture, the statistics at the end.

    Raises UserError if the sheet would be too large.
    """
    side = sheet.rows[0].cells[0].picture.width
    font = _font(max(_MIN_FONT, side // _PICTURE_PER_FONT))
    line, gap = round(1.4 * font.size), round(0.6 * font.size)
    margin, columns = 2 * gap, len(sheet.rows[0].cells)
    width = 2 * margin + columns * side + (columns - 1) * gap
    text_width = width - 2 * margin
    title, summaries = _wrap([sheet.title], font, text_width), _wrap(map(str, sheet.summaries), font, text_width)
    swatch = 2 * line
    legend = [(cell, _wrap([f"{cell.label}: {cell.note}"], font, text_width - swatch - gap)) for cell in sheet.legend]
    legend_heights = [max(swatch, len(texts) * line) + gap for _, texts in legend]
    row_height = side + line + gap
    height = 2 * margin + (len(title) + 1 + len(summaries)) * line + 3 * gap + len(sheet.rows) * row_height
    height += sum(legend_heights)
    _check_size(width, height)

    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = _write(draw, title, margin, margin, font, line, _SOFT_INK) + gap
    lefts = [margin + column * (side + gap) for column in range(columns)]
    for left, cell in zip(lefts, sheet.rows[0].cells, strict=True):
        draw.text((left, top), _elide(cell.label, font, side), _INK, font)
    top += line
    for row in sheet.rows:
        for left, cell in zip(lefts, row.cells, strict=True):
            canvas.paste(cell.picture, (left, top))
            draw.text((left, top + side + gap // 3), _elide(cell.note, font, side), _SOFT_INK, font)
        top += row_height
    top = _write(draw, summaries, margin, top + gap, font, line, _INK) + gap
    for (cell, texts), cell_height in zip(legend, legend_heights, strict=True):
        canvas.paste(cell.picture.resize((swatch, swatch), Image.Resampling.NEAREST), (margin, top))
        _write(draw, texts, margin + swatch + gap, top, font, line, _INK)
        top += cell_height
    return canvas


def side_by_side(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Equally high pictures as one, with a gap between them."""
    strip = Image.new("RGB", (sum(one.width + gap for one in pictures) - gap, pictures[0].height), _PAPER)
    left = 0
    for one in pictures:
        strip.paste(one, (left, 0))
        left += one.width + gap
    return strip


def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, FreeTypeFont), "Pillow was built without FreeType"
    return font


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int, font: FreeTypeFont, height: int, ink: str
) -> int:
    """Lines of text under each other; returns where the next one would be."""
    for text in lines:
        draw.text((left, top), text, ink, font)
        top += height
    return top


def _wrap(texts: Iterable[str], font: FreeTypeFont, width: int) -> list[str]:
    """Texts as lines that are no wider than this, broken between words."""
    lines = []
    for text in texts:
        words = text.split()
        current = words[0]
        for word in words[1:]:
            longer = f"{current} {word}"
            if font.getlength(longer) > width:
                lines.append(current)
                current = word
            else:
                current = longer
        lines.append(current)
    return lines


def _elide(text: str, font: FreeTypeFont, width: int) -> str:
    """The text, or its beginning and "…" where it is too wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _check_size(width: int, height: int) -> None:
    if max(width, height) > _MAX_SIDE or width * height > _MAX_PIXELS:
        raise UserError(
            f"a sheet of {width} x {height} pixels is too large: take fewer --images or --strategies, or write .html"
        )
