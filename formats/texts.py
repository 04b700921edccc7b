"""Captions and other text from outside: UTF-8, with or without a byte order mark, or refused."""

from __future__ import annotations

import unicodedata

# Letters and marks that draw nothing: fillers, a joiner, a blank of braille; variation selectors are a range.
_DRAW_NOTHING = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")


class TextError(ValueError):
    """Bytes that are no text; says why."""


def decode_text(data: bytes) -> str:
    """The text that bytes are, without a byte order mark; "" if it shows nothing.

    Raises TextError for bytes that are not UTF-8, and for text in UTF-16, which can pass for UTF-8 full of NULs.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = " (UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise TextError(f"not UTF-8{kind}: byte {error.start} is {data[error.start]:#04x}") from None
    text = text.strip("\0").strip()
    if is_blank(text):
        return ""
    if "\0" in text:
        raise TextError("NUL bytes between its letters: not UTF-8, perhaps UTF-16")
    return text


def is_blank(text: str) -> bool:
    """Whether a reader would see nothing: white space, zero-width characters, controls."""
    return all(map(_is_invisible, text))


def clean(text: str) -> str:
    """Text from a server, a list or a library as it can be written anywhere: valid Unicode, without NUL.

    Lone surrogates, which stand for bytes that were not text, become U+FFFD.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")


def _is_invisible(character: str) -> bool:
    if unicodedata.category(character) in _INVISIBLE_CATEGORIES or character in _DRAW_NOTHING:
        return True
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
