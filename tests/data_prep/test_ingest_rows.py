"""`data-prep ingest`, row by row: what is kept, and what is dropped with its reason."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_helpers import done, read, rows_of

from data_prep.lists.cleaning import canonical_url
from data_prep.lists.filters import BlockList, Filters
from data_prep.lists.ingest import ingest
from data_prep.lists.list_files import ListFormat
from data_prep.lists.rows import Options, Rejects, canonicalise
from formats.errors import UserError


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


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


def test_values_that_cannot_be_used_are_left_empty_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = [".25", " 0.5", "NaN", "inf", "high", ""]
    rows = "".join(f"http://a/{index},x,{score}\n" for index, score in enumerate(scores))
    tally = done(ingest([write(tmp_path, "l.csv", "url,caption,similarity\n" + rows)], str(tmp_path / "u.parquet")))
    assert read(tmp_path / "u.parquet")["similarity"].to_pylist() == [0.25, 0.5, None, None, None, None]
    assert (tally.written, tally.emptied) == (6, Counter({"similarity is no number": 3}))
    assert "similarity is no number" in capsys.readouterr().out
    assert json.loads((tmp_path / "u.ingest.json").read_text())["emptied"] == {"similarity is no number": 3}


def test_values_of_json_of_any_kind_are_used_or_counted(tmp_path: Path) -> None:
    captions: list[object] = ["one", 7, ["a", "b"], {"en": "x"}, True, None, float("nan"), "x"]
    scores: list[object] = [0.5, "0.5", None, 1, 2, 3, 4, [0.5]]
    rows = [
        {"url": f"http://a/{index}", "caption": caption, "similarity": score, "width": True}
        for index, (caption, score) in enumerate(zip(captions, scores, strict=True))
    ]
    for name, content in (("l.jsonl", "\n".join(map(json.dumps, rows))), ("l.json", json.dumps(rows, indent=1))):
        tally = done(ingest([write(tmp_path, name, content)], str(tmp_path / "u.parquet")))
        assert rows_of(tmp_path / "u.parquet") == [("http://a/0", "one"), ("http://a/1", "7"), ("http://a/7", "x")]
        assert read(tmp_path / "u.parquet")["similarity"].to_pylist() == [0.5, 0.5, None]
        assert +tally.dropped == Counter({"caption is no text": 3, "no caption": 2})
        assert +tally.emptied == Counter({"width is no number": 3, "similarity is no number": 1})
        assert tally.read == len(rows)


def test_a_row_whose_faces_could_not_be_blurred_is_dropped(tmp_path: Path) -> None:
    boxes = [[[0.1, 0.1, 0.2, 0.2]], "a face", None]
    rows = [{"url": f"http://a/{index}", "caption": "x", "face_bboxes": value} for index, value in enumerate(boxes)]
    path = write(tmp_path, "l.jsonl", "\n".join(map(json.dumps, rows)))
    tally = done(ingest([path], str(tmp_path / "u.parquet")))
    assert read(tmp_path / "u.parquet")["face_bboxes"].to_pylist() == [
        [[pytest.approx(edge) for edge in (0.1, 0.1, 0.2, 0.2)]], None,
    ]  # fmt: skip
    assert +tally.dropped == Counter({"face_bboxes are no boxes": 1})


@pytest.mark.parametrize(
    ("filters", "column", "values"),
    [
        (Filters(min_similarity=0.3), "similarity", ["high", "low"]),
        (Filters(max_punsafe=0.3), "punsafe", [True, False]),
        (Filters(min_side=100), "width", [[1], [2]]),
        (Filters(block=BlockList(sha256s=frozenset({"a" * 64}))), "sha256", ["5d41402a", "7d793037"]),
    ],
)
def test_a_limit_on_a_column_that_cannot_be_read_is_refused(
    tmp_path: Path, filters: Filters, column: str, values: list[object]
) -> None:
    columns = {"url": ["http://a/1", "http://a/2"], "caption": ["x", "y"], "height": [1, 2], column: values}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    with pytest.raises(UserError, match=rf"l\.parquet: .* needs .*the first rows have none in the column '{column}'"):
        ingest([str(tmp_path / "l.parquet")], str(tmp_path / "u.parquet"), Options(filters=filters))
    assert [path.name for path in tmp_path.iterdir()] == ["l.parquet"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("url,caption\nhttp://a/1,x\n".encode("utf-16"), "is UTF-16.*iconv"),
        ("url,caption\nhttp://a/1,x\n".encode("utf-16-le"), "is UTF-16.*iconv"),
        (b"url,caption\rhttp://a/1,x\r", r"carriage returns alone.*tr "),
        (b"url,url,caption\nhttp://a/1,x,y\n", "several columns named 'url'"),
        (b'"url,caption\nhttp://a/1,x\n', "no header"),
    ],
)
def test_a_text_in_another_form_is_refused_with_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"l\.csv: .*{message}"):
        ingest([str(tmp_path / "l.csv")], str(tmp_path / "u.parquet"))


def test_a_byte_order_mark_and_latin_letters(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("\ufeffurl,caption\nhttp://a/1,é\n".encode() + "http://a/2,é\n".encode("latin-1"))
    tally = done(ingest([str(tmp_path / "l.csv")], str(tmp_path / "u.parquet")))
    assert (rows_of(tmp_path / "u.parquet"), +tally.dropped) == ([("http://a/1", "é")], Counter({"not UTF-8": 1}))


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


PIECES = [
    *(
        b"url",
        b"caption",
        b"http://a/1",
        b"http://a/2",
        b"x",
        b",",
        b"\t",
        b"\n",
        b"\r",
        b'"',
        b"\xff",
        b"\0",
        b"\xef\xbb\xbf",
    ),
    *(b"NaN", b"[", b"]", b"{", b"}", b":"),
    *(b'{"url": "http://a/3", "caption": "x"}', b'{"url": null, "caption": ["x"]}'),
]
ANY_TABLE = st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet", "csv.gz"]), st.booleans(), ANY_TABLE)
def test_any_bytes_are_refused_or_every_row_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, headed: bool, content: bytes
) -> None:
    header = {"csv": b"url,caption\n", "tsv": b"url\tcaption\n"}.get(kind, b"") if headed else b""
    (tmp_path / f"l.{kind}").write_bytes(header + content)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    try:
        tally = done(ingest([str(tmp_path / f"l.{kind}")], str(tmp_path / "out")))
    except UserError:
        assert not (tmp_path / "out").exists()
    else:
        assert tally.read == tally.written + tally.dropped.total()
        assert tally.written == len(rows_of(tmp_path / "out")) > 0
