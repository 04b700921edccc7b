"""The readers of url lists: any bytes, any cut into pieces, against slow readers of one line at a time."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.lists.filters import Filters
from data_prep.lists.list_files import ColumnChoice, find_columns
from data_prep.lists.rows import Rejects, canonicalise
from data_prep.tables import lines as lines_module
from data_prep.tables.lines import OVERLONG, blocks_of_lines, lines
from data_prep.tables.readers import ROW_READERS, Range, read_chunks
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
