from __future__ import annotations

import json
import unicodedata
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.lists.cleaning import BLANK, BOXES, boxes, canonical_url, canonical_urls, clean_captions, numbers
from formats.texts import is_blank

BIDI = "\N{RIGHT-TO-LEFT OVERRIDE}\N{POP DIRECTIONAL FORMATTING}\N{RIGHT-TO-LEFT ISOLATE}\N{POP DIRECTIONAL ISOLATE}"
INVISIBLE = set(BIDI + "\0\x07\x1b\x7f\N{SOFT HYPHEN}\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}\N{TAG SPACE}")
WHITE = set(" \t\n\v\f\r\x85\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{LINE SEPARATOR}\N{THIN SPACE}")
VISIBLE = (
    "aZ~!é\u0301e\N{LATIN SMALL LETTER E WITH ACUTE}שק中\N{ZERO WIDTH JOINER}\N{CAT FACE}"
    "\N{VARIATION SELECTOR-16}\N{ANGSTROM SIGN}"
)
SIGNS = [*sorted(INVISIBLE | WHITE), *VISIBLE, *"\u2800\u3164\u034f\ufe0f"]
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


@settings(deadline=None)
@given(st.text(st.one_of(st.sampled_from(SIGNS), st.characters(codec="utf-8"))))
def test_blank_is_what_shows_nothing(caption: str) -> None:
    assert pc.match_substring_regex(pa.array([caption]), BLANK)[0].as_py() == is_blank(caption)


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


def as_column(values: list[object], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([".5", " 0.25", "+1.", "-2e1", "3"], [0.5, 0.25, 1.0, -20.0, 3.0]),
        (["", "  ", None], [None, None, None]),  # nothing was said
        (["1,5", "nan", "inf", "x", "1e99", "--1", "0x1"], ["no"] * 7),
        ([float("nan"), float("inf"), -float("inf"), 1e300, 0.5], ["no"] * 4 + [0.5]),
        ([True, False], ["no", "no"]),
        ([[0.5], None], ["no", None]),
        ([7, -3], [7.0, -3.0]),
    ],
)
def test_numbers_as_people_write_them(values: list[object], expected: list[object]) -> None:
    column, bad = numbers(as_column(values), pa.float32())
    assert ["no" if is_bad else value for value, is_bad in zip(column.to_pylist(), bad.to_pylist(), strict=True)] == (
        expected
    )


def test_whole_numbers_keep_to_their_type() -> None:
    column, bad = numbers(as_column(["640.0", "2147483648", "-1"]), pa.int32())
    assert (column.to_pylist(), bad.to_pylist()) == ([640, None, -1], [False, True, False])


BOX = [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ([], []),
        ([BOX], [BOX]),
        (BOX, [BOX]),  # one box by itself
        (json.dumps([BOX, BOX]), [BOX, BOX]),
        ({"left": 0.25, "top": 0.5, "right": 0.75, "bottom": 1}, [BOX]),
        ([{"x1": 0.25, "y1": 0.5, "x2": 0.75, "y2": 1}], [BOX]),
        (json.dumps({"x": 0.25, "y": 0.5, "w": 0.5, "h": 0.5}), [BOX]),
        ([[50, 50, 150, 100]], [[50, 50, 150, 100]]),  # pixels: the download knows of how many
        ([[0.5, 0.5, 0.1, 0.1]], "no"),  # right is left of left
        ([[0.5, 0.5]], "no"),
        ([[0.1, 0.1, float("nan"), 0.2]], "no"),
        ("[[1e999, 0, 0, 1]]", "no"),
        (f"[[{10**400}, 0, 0, 1]]", "no"),
        ('{"box":' * 900 + "1" + "}" * 900, "no"),
        ("[[0.5", "no"),
        ("a face", "no"),
        ({"face": 1}, "no"),
    ],
)
def test_boxes_in_the_layouts_that_people_have(value: object, expected: object) -> None:
    column, bad = boxes(as_column([value]))
    assert ("no" if bad[0].as_py() else column[0].as_py()) == expected


def test_one_row_with_other_boxes_leaves_the_rest_as_it_is() -> None:
    column, bad = boxes(as_column([[BOX], [[0.25, None, 1.0, 1.0]], None, [], [[0.5, 0.5, 0.25, 1.0]]], BOXES))
    assert column.to_pylist() == [[BOX], None, None, [], None]
    assert bad.to_pylist() == [False, True, False, False, True]
