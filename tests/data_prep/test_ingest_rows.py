"""`data-prep ingest`, row by row: what is kept, and what is dropped with its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_helpers import done, read, rows_of

from data_prep.lists.cleaning import canonical_url
from data_prep.lists.filters import Filters
from data_prep.lists.ingest import ingest
from data_prep.lists.list_files import ListFormat
from data_prep.lists.rows import Options, Rejects, canonicalise


def test_each_unusable_row_is_dropped_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_bytes(
        b"http://a.example/1.jpg\tkept\n"
        b"ftp://a.example/2.jpg\tanother scheme\n"
        b"file:///etc/hostname\ta local file\n"
        b"http://\tno host\n"
        b"http://me:secret@a.example/with.jpg\ta password\n"
        b"\tno url\n"
        b"http://a.example/3.jpg\t  \n"
        b"http://a.example/4.jpg\tcaf\xe9\n"
        b"http://a.example/5.jpg\ttoo\tmany\n"
        b"too few \xff\n"
        b"http://a.example/6.jpg\tunbalanced \" quote\n"
        b"  HTTPS://a.example/7 8.jpg \t trimmed\0 \n"
        b"https://a.example/7%208.jpg\tthe same address\n"
        b"http://a.example/9.jpg\t" + b"long " * 2_000_000 + b"\n"
        b"http://a.example/10.jpg\t\xe2\x80\xaegnp.exe \xf0\x9f\x90\xb1\n"
    )  # fmt: skip
    output = tmp_path / "urls.parquet"
    tally = done(ingest([str(path)], str(output), Options(ListFormat("cc12m"))))
    assert rows_of(output) == [
        ("http://a.example/1.jpg", "kept"),
        ("http://a.example/6.jpg", 'unbalanced " quote'),
        ("https://a.example/7%208.jpg", "trimmed"),
        ("http://a.example/10.jpg", "gnp.exe \N{CAT FACE}"),
    ]
    expected = {
        "url not http(s)": 2, "malformed url": 2, "malformed line": 2, "no url": 1, "no caption": 1, "not UTF-8": 1,
        "duplicate url": 1, "caption too long": 1,
    }  # fmt: skip
    assert +tally.dropped == Counter(expected)
    assert tally.read == 15
    rejects = [json.loads(line) for line in (tmp_path / "urls.rejects.jsonl").read_text().splitlines()]
    assert Counter(reject["reason"] for reject in rejects) == Counter(expected) - Counter({"duplicate url": 1})
    assert {reject["list"] for reject in rejects} == {f"file://{path}"}
    assert max(len(reject.get("caption", "")) for reject in rejects) == 300
    report = json.loads((tmp_path / "urls.ingest.json").read_text())
    assert (report["read"], report["written"], report["dropped"]) == (15, 4, expected)


def test_malformed_lines_of_csv_and_json_are_counted(tmp_path: Path) -> None:
    csv_path, jsonl_path = tmp_path / "a.csv", tmp_path / "b.jsonl"
    csv_path.write_bytes(
        b'url,caption\nhttp://a/1,"two\nlines"\nhttp://a/2\nhttp://a/3,x,y\n\nhttp://a/4,nul\0byte\nhttp://a/5,\xff\n'
    )
    jsonl_path.write_bytes(
        b'{"url": "http://a/6", "caption": "six", "width": 640}\nnot json\n[1]\n\n{"url": "http://a/7"}\n'
        b'{"url": "http://a/8", "caption": "\\ud800"}\n{"url": 9, "caption": "x"}\n'
    )
    output = tmp_path / "urls.parquet"
    tally = done(ingest([str(csv_path), str(jsonl_path)], str(output)))
    assert rows_of(output) == [("http://a/1", "two lines"), ("http://a/4", "nulbyte"), ("http://a/6", "six")]
    assert +tally.dropped == Counter({"malformed line": 4, "not UTF-8": 2, "no caption": 1, "url not http(s)": 1})
    assert read(output)["width"].to_pylist() == [None, None, 640]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_text_of_any_type_that_is_not_utf8_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    wrong = pa.array([b"good", b"caf\xe9", None], pa.binary())
    if pa.types.is_dictionary(kind):
        wrong = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int32()), wrong.slice(0, 2).view(pa.string()))
    elif kind != pa.binary():
        wrong = wrong.view(pa.string()) if kind == pa.string() else wrong.cast(pa.large_binary()).view(kind)
    table = pa.table({"url": [f"http://a/{index}" for index in range(3)], "caption": wrong})
    rejects = Rejects()
    assert canonicalise(table, Filters(), rejects)["caption"].to_pylist() == ["good"]
    assert +rejects.counts == Counter({"not UTF-8": 1, "no caption": 1})


TEXT = st.one_of(st.none(), st.binary(max_size=12), st.sampled_from([b"http://a/b", b"https://x", b" HTTP://q "]))


def usable(url: bytes | None, caption: bytes | None) -> str | None:
    """The rule for one row, without Arrow: the url to fetch, or None."""
    try:
        address, words = ((value or b"").decode("utf-8").strip() for value in (url, caption))
    except UnicodeDecodeError:
        return None
    visible = [character for character in words if character.isprintable() and not character.isspace()]
    return canonical_url(address) if visible else None


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=12))
def test_canonicalise_equals_the_rule_for_one_row(rows: list[tuple[bytes | None, bytes | None]]) -> None:
    table = pa.table(
        {name: pa.array([row[i] for row in rows], pa.binary()) for i, name in enumerate(("url", "caption"))}
    )
    rejects = Rejects()
    canonical = canonicalise(table, Filters(), rejects)
    expected = [url for url in (usable(*row) for row in rows) if url]
    assert canonical["url"].to_pylist() == expected
    assert rejects.counts.total() == len(rows) - len(expected)
    assert len(rejects.examples) <= len(rows)
