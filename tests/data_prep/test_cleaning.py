from __future__ import annotations

import unicodedata
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.lists.cleaning import canonical_url, canonical_urls, clean_captions

BIDI = "\N{RIGHT-TO-LEFT OVERRIDE}\N{POP DIRECTIONAL FORMATTING}\N{RIGHT-TO-LEFT ISOLATE}\N{POP DIRECTIONAL ISOLATE}"
INVISIBLE = set(BIDI + "\0\x07\x1b\x7f\N{SOFT HYPHEN}\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}\N{TAG SPACE}")
WHITE = set(" \t\n\v\f\r\x85\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{LINE SEPARATOR}\N{THIN SPACE}")
VISIBLE = (
    "aZ~!é\u0301e\N{LATIN SMALL LETTER E WITH ACUTE}שק中\N{ZERO WIDTH JOINER}\N{CAT FACE}"
    "\N{VARIATION SELECTOR-16}\N{ANGSTROM SIGN}"
)
CAPTIONS = st.text(st.sampled_from(sorted(INVISIBLE | WHITE) + list(VISIBLE)), max_size=12)


def clean(*captions: str | None) -> list[str | None]:
    return clean_captions(pa.chunked_array([pa.array(captions, pa.string())])).to_pylist()


def clean_slowly(caption: str) -> str:
    visible = "".join(character for character in caption if character not in INVISIBLE)
    words = "".join(" " if character in WHITE else character for character in visible).split(" ")
    return unicodedata.normalize("NFC", " ".join(word for word in words if word))


@settings(deadline=None)
@given(st.lists(CAPTIONS, max_size=6))
def test_captions_equal_a_character_loop(captions: list[str]) -> None:
    cleaned = clean(*captions)
    assert cleaned == [clean_slowly(caption) for caption in captions]
    assert clean(*cleaned) == cleaned


@settings(deadline=None)
@given(st.text(max_size=40))
def test_cleaning_twice_changes_nothing_more(caption: str) -> None:
    once = clean(caption)
    assert clean(*once) == once
    assert not any(unicodedata.category(character) == "Cc" for character in str(once[0]))


def test_emoji_and_persian_keep_their_joiners() -> None:
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
    persian = "می\N{ZERO WIDTH NON-JOINER}خواهم"
    assert clean(family, persian, None, "x" * 10_000_000) == [family, persian, None, "x" * 10_000_000]
    assert clean("a\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe\0") == ["agpj.exe"]


PIECES = [
    "http://", "https://", "HTTP://", "ftp://", "a", "b.example", "A.ex", "xn--a.example", "1.2", "0x7f.1", "[::1]",
    "/", "/.", "/..", "%2e", "%2E", "%zz", "%41", "?", "#", "'", "q=x", "\\", "ü", " ", "\t", ":80", ":443", ":8080",
    "@", "~", "|", "^", "{", "-", "--", "_", "*", "www.site.com", "/img.jpg", "//", "..", ".",
]  # fmt: skip
URLS = st.builds(
    lambda start, rest: start + "".join(rest),
    st.sampled_from(["", "http://www.site.com/", "https://a-b.example/x", "http://ab.cd"]),
    st.lists(st.sampled_from(PIECES), max_size=7),
)


@settings(deadline=None)
@given(st.lists(URLS, max_size=5))
def test_the_fast_path_is_the_parser_and_both_are_idempotent(urls: list[str]) -> None:
    fast = canonical_urls(pa.chunked_array([pa.array(urls, pa.string())])).to_pylist()
    assert fast == [canonical_url(url) for url in urls]
    kept = [url for url in fast if url is not None]
    assert [canonical_url(url) for url in kept] == kept
    for url in kept:
        parts = urlsplit(url)
        assert parts.scheme in ("http", "https")
        assert parts.netloc == parts.netloc.lower()
        assert not parts.fragment
        assert "@" not in parts.netloc
        assert all("!" <= character <= "~" for character in url)


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("HTTP://Site.COM:80/A%20b?Q=1#top", "http://site.com/A%20b?Q=1"),
        ("https://site.com", "https://site.com/"),
        ("http://site.com/a/../b/./c d.jpg", "http://site.com/b/c%20d.jpg"),
        ("http://bücher.example/ü", "http://xn--bcher-kva.example/%C3%BC"),
        ("https://site.com:443/x", "https://site.com/x"),
        ("https://site.com:8443/x", "https://site.com:8443/x"),
        ("http://2130706433/", "http://127.0.0.1/"),  # a number is an address: the downloader's check must see it
        ("http://user:secret@site.com/", None),
        ("file:///etc/hostname", None),
        ("http://", None),
        ("http://a b/", None),
        ("//site.com/x", None),
    ],
)
def test_the_url_that_a_browser_would_request(url: str, canonical: str | None) -> None:
    assert canonical_url(url) == canonical
