"""The readers of url lists: any bytes, any cut into pieces, against slow readers of one line at a time."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.lists.filters import Filters
from data_prep.lists.list_files import ColumnChoice, find_columns
from data_prep.lists.rows import Rejects, canonicalise
from data_prep.tables import lines as lines_module
from data_prep.tables.files import columns_of, find_tables
from data_prep.tables.lines import OVERLONG, CsvRecords, Range, blocks_of_lines, lines
from data_prep.tables.readers import NO_TEXT, ROW_READERS, read_chunks, read_rows
from formats.errors import UserError

COLUMNS = {"url": "url", "caption": "caption"}
BYTES = st.lists(
    st.sampled_from(
        [b"\n", b"\t", b"\r", b"\r\n", b"\0", b'"', b"\\", b"http://a/", b"cat", b"\xff", "é".encode(), b" "]
    )
).map(b"".join)


def rows_of(kind: str, content: bytes, cuts: Sequence[int] = ()) -> tuple[list[tuple[object, object]], int]:
    """Rows and number of malformed lines that a reader finds in the pieces between the cuts."""
    rows, malformed = [], 0
    ends = [0, *sorted(cuts)]
    for start, stop in zip(ends, [*ends[1:], None], strict=True):
        for chunk in read_chunks(kind, io.BytesIO(content), Range(start, stop), ["url", "caption"], COLUMNS):
            rows += list(zip(chunk.table["url"].to_pylist(), chunk.table["caption"].to_pylist(), strict=True))
            malformed += len(chunk.refused)
    return rows, malformed


@settings(deadline=None)
@given(BYTES, st.data())
def test_a_tsv_is_lines_of_two_fields_however_it_is_cut(content: bytes, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=3))
    rows, malformed = [], 0
    for line in content.split(b"\n"):
        fields = line.removesuffix(b"\r").replace(b"\r", b" ").split(b"\t")
        if len(fields) == 2:
            rows.append((fields[0], fields[1]))
        elif fields != [b""]:  # empty lines are no rows
            malformed += 1
    assert rows_of("tsv", content, cuts) == (rows, malformed)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b'{"url": "u", "caption": "c"}', b"[1]", b"{", b"", b"\xff", b'{"url": 1}'])), st.data()
)
def test_json_lines_however_they_are_cut(records: list[bytes], data: st.DataObject) -> None:
    content = b"\n".join(records)
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=3))
    good = {records[i]: None for i in range(len(records)) if records[i].startswith(b'{"')}
    expected = [
        tuple(None if (value := json.loads(line).get(key)) is None else str(value).encode() for key in COLUMNS)
        for line in records
        if line in good
    ]
    rows, malformed = rows_of("jsonl", content, cuts)
    assert rows == expected
    assert malformed == sum(line not in good and line != b"" for line in records)


FIELDS = st.text(st.sampled_from("ab\",\n\r\0 é'\t"), max_size=6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(FIELDS, FIELDS, FIELDS), max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.booleans(),
)
def test_a_well_formed_csv_is_what_python_reads(
    rows: list[tuple[str, str, str]], line_end: str, quoting: Literal[0, 1], ends: bool
) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end, quoting=quoting).writerows(rows)
    content = text.getvalue().encode()
    content = content if ends else content.removesuffix(line_end.encode())
    expected = [tuple(row) for row in csv.reader(io.StringIO(content.decode(), newline=""))]
    assume(expected == rows)  # the writer may leave a carriage return without quotes
    records = list(CsvRecords(lines(io.BytesIO(content)), 3))
    assert [tuple(field.decode() for field in fields or ()) for _, fields in records] == rows
    assert b"".join(raw for raw, _ in records) == content


@settings(deadline=None)
@given(st.text('",a\n\r', max_size=40).map(str.encode), st.integers(1, 3))
def test_every_line_of_a_csv_is_in_one_record_or_refused(content: bytes, width: int) -> None:
    position = 0
    for raw, fields in CsvRecords(lines(io.BytesIO(content)), width):
        between = content[position:].partition(raw)[0]
        assert between.strip(b"\r\n") == b""  # nothing but empty lines
        position += len(between) + len(raw)
        assert len(fields or ()) in (0, width)
        assert fields or b"\n" not in raw.removesuffix(b"\n")  # what is refused is one line
    assert content[position:].strip(b"\r\n") == b""


@pytest.mark.parametrize(
    ("broken", "given"),
    [
        (b'2,"never closed', 7),
        (b'2,"closed" before text', 7),
        (b'2,"a", comma', 7),
        (b"2,too,many", 7),
        (b"2", 7),
        (b'2,a 5" pipe', 8),  # a quote within a field is a character like others
    ],
)
@pytest.mark.parametrize("after", [b"x,y", b'x,"y"', b'x,""', b'x,"y, z"', b'x,"y ""z"""'])
def test_a_row_that_does_not_fit_costs_itself(broken: bytes, given: int, after: bytes) -> None:
    content = b"\n".join([b"1,one", broken, *[after] * 6, b""])
    found = [fields for _, fields in CsvRecords(lines(io.BytesIO(content)), 2)]
    assert (len([fields for fields in found if fields]), found.count(None)) == (given, 8 - given)


def test_a_quoted_field_may_have_many_lines_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_RECORD_BYTES", 200)
    for line_count, taken in ((20, [b"1", b"3"]), (100, [b"3"])):
        content = b'1,"' + b"line\n" * line_count + b'"\n3,x\n'
        found = list(CsvRecords(lines(io.BytesIO(content)), 2))
        assert [fields[0] for _, fields in found if fields] == taken
        assert sum(fields is None for _, fields in found) == (0 if line_count == 20 else line_count + 1)


@pytest.mark.parametrize("line", [b'a","x\n', b'a,"x""\n', b'a,"x\nb\n'])
def test_quotes_that_are_never_closed_take_no_more_time_than_their_lines(line: bytes) -> None:
    seconds = {}
    for count in (1_000, 8_000):
        start_s = time.process_time()
        records = list(CsvRecords(lines(io.BytesIO(line * count)), 2))
        seconds[count] = time.process_time() - start_s
        assert len(records) >= count / 2
    assert seconds[8_000] < 25 * seconds[1_000] + 0.2  # 64 times if every line led to the end


def test_rows_are_python_values_whatever_the_kind_of_table() -> None:
    texts = {
        "tsv": b"u\tone\nv\tcaf\xe9\n",
        "csv": b'u,"one"\nv,caf\xe9\n',
        "jsonl": b'{"url": "u", "caption": "one"}\n{"url": "v", "caption": "\\ud800"}\n',
        "json": b'[{"url": "u", "caption": "one"}, {"url": "v", "caption": "\\ud800"}]',
    }
    for kind, content in texts.items():
        rows = list(read_rows(kind, io.BytesIO(content), Range(), ["url", "caption"], COLUMNS))
        assert rows == [{"url": "u", "caption": "one"}, NO_TEXT], kind
    buffer = io.BytesIO()
    wrong = pa.array([b"one", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": [b"u", b"v"], "caption": wrong}), buffer)
    rows = list(read_rows("parquet", buffer, Range(), ["url", "caption"], COLUMNS))
    assert rows == [{"url": b"u", "caption": "one"}, NO_TEXT]


@pytest.mark.parametrize("kind", ["tsv", *ROW_READERS])
@settings(deadline=None)
@given(content=BYTES)
def test_no_bytes_break_a_reader(kind: str, content: bytes) -> None:
    try:
        rows_of(kind, content)
    except UserError:
        assert kind.endswith("json")


@settings(deadline=None)
@given(st.binary(max_size=60), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_parquet_gives_rows_or_a_known_error(tail: bytes, changes: list[tuple[int, int]]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"url": ["http://a/1"] * 3, "caption": ["x", None, "y"]}), buffer)
    content = bytearray(buffer.getvalue())
    for position, value in changes:
        content[position % len(content)] = value
    stream = io.BytesIO(bytes(content) + tail)
    with contextlib.suppress(pa.ArrowException, OSError, UnicodeDecodeError, UserError):
        for chunk in read_chunks("parquet", stream, Range(), ["url", "caption"], COLUMNS):
            assert all(row["url"].isascii() for row in canonicalise(chunk.table, Filters(), Rejects()).to_pylist())


@settings(deadline=None)
@given(st.text("ab\n\r", max_size=40).map(str.encode), st.integers(1, 7), st.data())
def test_blocks_hold_every_line_once(content: bytes, block_bytes: int, data: st.DataObject) -> None:
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, len(content)), max_size=3))})
    blocks = [
        block
        for start, stop in zip(cuts, [*cuts[1:], None], strict=True)
        for block, _ in blocks_of_lines(io.BytesIO(content), start, stop, block_bytes)
    ]
    assert b"".join(blocks) == content
    assert all(block.endswith(b"\n") for block in blocks[:-1])


def test_a_line_too_long_is_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 16)
    content = b"u\tshort\n" + b"x" * 200 + b"\tno\nu\tafter it\n"
    blocks = list(blocks_of_lines(io.BytesIO(content), block_bytes=16))
    assert b"".join(block for block, _ in blocks) == b"u\tshort\nu\tafter it\n"
    assert sum(overlong for _, overlong in blocks) == 1
    assert list(lines(io.BytesIO(content * 2**16)))[:3] != []  # the default block: lines arrive whole
    assert OVERLONG.count(b"\n") == 1


def test_sbu_and_coco_files() -> None:
    sbu = json.dumps({"image_urls": ["http://a/1", "http://a/2"], "captions": ["one", "two"], "user_ids": [1, 2]})
    assert rows_of("sbu-json", sbu.encode())[0] == [(b"http://a/1", b"one"), (b"http://a/2", b"two")]
    coco = {
        "images": [{"id": 7, "coco_url": "http://c/7.jpg", "width": 640, "height": 480}],
        "annotations": [
            {"image_id": 7, "caption": "a"},
            {"image_id": 7, "caption": "b"},
            {"image_id": 8, "caption": "c"},
        ],
    }
    rows, _ = rows_of("coco-json", json.dumps(coco).encode())
    assert rows == [(b"http://c/7.jpg", b"a"), (b"http://c/7.jpg", b"b"), (None, b"c")]
    for wrong in (b"[1]", b"{", b'{"images": 1}'):
        with pytest.raises(UserError, match="not a"):
            rows_of("coco-json", wrong)


def test_columns_are_found_by_their_usual_names_in_any_case() -> None:
    laion = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "LANGUAGE", "hash"]
    assert find_columns(laion, ColumnChoice()) == {
        "url": "URL", "caption": "TEXT", "width": "WIDTH", "height": "HEIGHT", "similarity": "similarity",
        "punsafe": "punsafe", "watermark": "pwatermark", "language": "LANGUAGE",
    }  # fmt: skip
    both = ["url", "text", "clip_b32_similarity_score", "clip_l14_similarity_score"]
    assert find_columns(both, ColumnChoice())["similarity"] == "clip_l14_similarity_score"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", b"url;caption\nhttp://a.example/1.jpg;a cat\n", "not cut at ';'; write it with commas"),
        ("csv", b"url\tcaption\n", "name it \\*.tsv"),
        ("tsv", b"url,caption\n", "not cut at ','"),
        ("parquet", b"PAR1 and no more", "is no whole parquet file .*: download it again"),
    ],
)
def test_what_a_table_is_instead_is_said(kind: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        columns_of(io.BytesIO(content), kind)


def test_an_archive_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "list.zip").touch()
    with pytest.raises(UserError, match=r"list\.zip is an archive of files: unpack it"):
        find_tables(str(tmp_path / "list.zip"))
