"""Cleaning what the web wrote: captions without invisible characters, urls as browsers send them, numbers, boxes."""

from __future__ import annotations

import ada_url
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.boxes import BoxError, Boxes, read_boxes

# control characters that are no white space, soft hyphen, zero width (but for the joiners that emoji and Persian need),
# marks and overrides of direction, invisible operators, byte order mark, annotations, tags (hidden ASCII)
INVISIBLE = (
    r"[\x{0}-\x{8}\x{e}-\x{1f}\x{7f}-\x{84}\x{86}-\x{9f}\x{ad}\x{61c}\x{180e}\x{200b}\x{200e}\x{200f}\x{202a}-\x{202e}"
    r"\x{2060}-\x{206f}\x{feff}\x{fff9}-\x{fffb}\x{e0000}-\x{e007f}]"
)
WHITE_SPACE = r"[\t\n\x{b}\f\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+"
# what remains visible to nobody, as `formats.texts.is_blank` has it
BLANK = (
    r"^[\p{Cc}\p{Cf}\p{Z}\x{34f}\x{115f}\x{1160}\x{17b4}\x{17b5}\x{2800}\x{3164}\x{fe00}-\x{fe0f}\x{ffa0}"
    r"\x{e0100}-\x{e01ef}]*$"
)
_NEEDS_CLEANING = r"[^!-~ ]|  |^ | $"  # anything but printable ASCII with single spaces between

# a browser would send these unchanged; everything else goes through a WHATWG parser
_ALREADY_CANONICAL = (
    r"^https?://[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)*\.[a-z][a-z]+"  # neither punycode nor an address
    r"(?:/(?:[A-Za-z0-9_~!$&()*+,;=:@-][A-Za-z0-9._~!$&()*+,;=:@%-]*)?)+"  # no segment that begins with a dot
    r"(?:\?[A-Za-z0-9._~!$&()*+,;=:@/?%-]+)?$"
)

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?$"
BOXES = pa.list_(pa.list_(pa.float32()))


def clean_captions(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Drop invisible characters, make every run of white space one space, trim, and compose (Unicode NFC)."""
    dirty = pc.match_substring_regex(captions, _NEEDS_CLEANING)
    if not pc.any(dirty).as_py():
        return captions
    texts = pc.replace_substring_regex(captions.filter(dirty), INVISIBLE, "")
    texts = pc.replace_substring_regex(texts, WHITE_SPACE, " ")
    texts = pc.utf8_normalize(pc.utf8_trim(texts, " "), form="NFC")
    return _replace_where(captions, dirty, texts)


def canonical_urls(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """The url that a browser would request (WHATWG): scheme and host in lower case, host in punycode, no default port,
    no `..`, no fragment, percent signs for what needs them. Null: cannot be parsed, is not http(s), or has a password.
    """
    canonical = pc.match_substring_regex(urls, _ALREADY_CANONICAL)
    if pc.all(canonical).as_py():
        return urls
    others = pc.invert(canonical)
    parsed = [canonical_url(text) for text in urls.filter(others).to_pylist()]
    return _replace_where(urls, others, pa.chunked_array([pa.array(parsed, pa.string())]))


def canonical_url(text: str) -> str | None:
    """The same for one url."""
    try:
        url = ada_url.URL(text)
    except ValueError:
        return None
    if url.protocol not in ("http:", "https:") or url.username or url.password:
        return None
    url.hash = ""
    return str(url.href)


def numbers(column: pa.ChunkedArray, kind: pa.DataType) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """A column as numbers of `kind`, and which of its values are none: words, NaN, infinite, or beyond the type."""
    given = pc.is_valid(column)
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        given = pc.and_(given, pc.not_equal(column, ""))
        column = pc.if_else(pc.match_substring_regex(column, _NUMBER), column, None)
    elif not (
        pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)
    ):
        column = pa.chunked_array([pa.nulls(len(column), pa.float64())])
    column = column.cast(pa.float64(), safe=False)
    largest = float(np.finfo(np.float32).max) if pa.types.is_floating(kind) else 2**31 - 1
    column = pc.if_else(pc.less_equal(pc.abs(column), largest), column, None)  # NaN is not
    return column.cast(kind, safe=False), pc.and_(pc.fill_null(given, False), pc.is_null(column))


def boxes(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """A column of boxes as [left, top, right, bottom], and which of its values are none (`data_prep.boxes`)."""
    if column.type in (BOXES, pa.list_(pa.list_(pa.float64()))) and _are_corners(column):
        return column.cast(BOXES, safe=False), pa.chunked_array([pa.array(np.zeros(len(column), np.bool_))])
    found: list[Boxes | None] = []
    bad = np.zeros(len(column), np.bool_)
    for row, value in enumerate(column.to_pylist()):
        try:
            found.append(None if value in (None, "") else read_boxes(value))
        except BoxError:
            found.append(None)
            bad[row] = True
    return pa.chunked_array([pa.array(found, BOXES)]), pa.chunked_array([pa.array(bad)])


def _are_corners(column: pa.ChunkedArray) -> bool:
    """Whether all boxes are [left, top, right, bottom] already."""
    each = column.combine_chunks().flatten()
    if not pc.all(pc.equal(pc.list_value_length(each), 4), min_count=0, skip_nulls=False).as_py():
        return False
    edges = each.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    return bool(np.isfinite(edges).all() and (edges[:, :2] <= edges[:, 2:]).all())


def _replace_where(column: pa.ChunkedArray, mask: pa.ChunkedArray, values: pa.ChunkedArray) -> pa.ChunkedArray:
    # replace_with_mask takes arrays, not chunks
    whole = pc.replace_with_mask(column.combine_chunks(), mask.combine_chunks(), values.combine_chunks())
    return pa.chunked_array([whole])
