"""Cleaning what the web wrote: captions without invisible characters, urls in the form that a browser sends."""

from __future__ import annotations

import ada_url
import pyarrow as pa
import pyarrow.compute as pc

# control characters that are no white space, soft hyphen, zero width (but for the joiners that emoji and Persian need),
# marks and overrides of direction, invisible operators, byte order mark, annotations, tags (hidden ASCII)
INVISIBLE = (
    r"[\x{0}-\x{8}\x{e}-\x{1f}\x{7f}-\x{84}\x{86}-\x{9f}\x{ad}\x{61c}\x{180e}\x{200b}\x{200e}\x{200f}\x{202a}-\x{202e}"
    r"\x{2060}-\x{206f}\x{feff}\x{fff9}-\x{fffb}\x{e0000}-\x{e007f}]"
)
WHITE_SPACE = r"[\t\n\x{b}\f\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+"
_NEEDS_CLEANING = r"[^!-~ ]|  |^ | $"  # anything but printable ASCII with single spaces between

# a browser would send these unchanged; everything else goes through a WHATWG parser
_ALREADY_CANONICAL = (
    r"^https?://[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)*\.[a-z][a-z]+"  # neither punycode nor an address
    r"(?:/(?:[A-Za-z0-9_~!$&()*+,;=:@-][A-Za-z0-9._~!$&()*+,;=:@%-]*)?)+"  # no segment that begins with a dot
    r"(?:\?[A-Za-z0-9._~!$&()*+,;=:@/?%-]+)?$"
)


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


def _replace_where(column: pa.ChunkedArray, mask: pa.ChunkedArray, values: pa.ChunkedArray) -> pa.ChunkedArray:
    # replace_with_mask takes arrays, not chunks
    whole = pc.replace_with_mask(column.combine_chunks(), mask.combine_chunks(), values.combine_chunks())
    return pa.chunked_array([whole])
