from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.ingest import FORMATS, SCHEMA, canonicalise, ingest
from data_prep.url_lists import ColumnChoice

AUTO = ColumnChoice()
ROWS = [
    ("http://a.example/1.jpg", 'a "quoted" cat, sitting'),
    ("https://b.example/2.png?x=1&y=2", "un chien à côté"),
    ("HTTP://c.example/3", "'single' and , comma"),
]


def rows_of(path: Path) -> list[tuple[str, str]]:
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    return list(zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True))


def write_list(folder: Path, kind: str) -> Path:
    path = folder / {"cc3m": "cc3m.tsv", "cc12m": "cc12m.tsv"}.get(kind, f"list.{kind}")
    if kind == "cc3m":
        path.write_text("".join(f"{caption}\t{url}\n" for url, caption in ROWS), encoding="utf-8")
    elif kind == "cc12m":
        path.write_text("".join(f"{url}\t{caption}\n" for url, caption in ROWS), encoding="utf-8")
    elif kind == "tsv.gz":
        text = "".join(f"{url}\t{caption}\n" for url, caption in ROWS)
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("id", "caption", "url"), *((7, c, u) for u, c in ROWS)])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"url": u, "text": c}) + "\n" for u, c in ROWS))
    else:
        pq.write_table(pa.table({"URL": [u for u, _ in ROWS], "TEXT": [c for _, c in ROWS]}), path)
    return path


@pytest.mark.parametrize("kind", ["cc3m", "cc12m", "tsv.gz", "csv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out" / "urls.parquet"
    tally = ingest([str(write_list(tmp_path, kind))], str(output), "auto", AUTO)
    assert rows_of(output) == ROWS
    assert (tally.read, tally.written, +tally.dropped) == (3, 3, Counter())
    uids = pq.read_table(output)["uid"].to_pylist()
    assert uids == [hashlib.sha256(f"{u}\n{c}".encode()).hexdigest()[:32] for u, c in ROWS]


def test_folders_and_patterns_of_several_lists(tmp_path: Path) -> None:
    for kind in ("cc3m", "csv", "jsonl"):
        write_list(tmp_path, kind)
    (tmp_path / "notes.md").write_text("not a list")
    output = tmp_path / "urls.out"
    assert ingest([str(tmp_path)], str(output), "auto", AUTO).written == 9
    assert ingest([str(tmp_path / "*.tsv"), str(tmp_path / "list.csv")], str(output), "auto", AUTO).written == 6


def test_paths_of_other_filesystems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/lists/cc12m.tsv", b"http://a.example/1.jpg\ta cat\n")
    ingest(["memory://lists/cc12m.tsv"], "memory://out/urls.parquet", "auto", AUTO)
    with memory.open("/out/urls.parquet") as stream:
        assert pq.read_table(stream)["caption"].to_pylist() == ["a cat"]
    assert [path.rsplit("/", 1)[-1] for path in memory.ls("/out", detail=False)] == ["urls.parquet"]


def test_each_unusable_row_is_dropped_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_bytes(
        b"http://a.example/1.jpg\tkept\n"
        b"ftp://a.example/2.jpg\tanother scheme\n"
        b"file:///etc/hostname\ta local file\n"
        b"http://\tno host\n"
        b"http://a.example/with space.jpg\tnot a url\n"
        b"\tno url\n"
        b"http://a.example/3.jpg\t  \n"
        b"http://a.example/4.jpg\tcaf\xe9\n"
        b"http://a.example/5.jpg\ttoo\tmany\n"
        b"too few\n"
        b"http://a.example/6.jpg\tunbalanced \" quote\n"
        b"  https://a.example/7.jpg \t trimmed \n"
    )  # fmt: skip
    output = tmp_path / "urls.parquet"
    tally = ingest([str(path)], str(output), "cc12m", AUTO)
    assert rows_of(output) == [
        ("http://a.example/1.jpg", "kept"),
        ("http://a.example/6.jpg", 'unbalanced " quote'),
        ("https://a.example/7.jpg", "trimmed"),
    ]
    assert +tally.dropped == Counter(
        {"url not http(s)": 4, "malformed line": 2, "no url": 1, "no caption": 1, "not UTF-8": 1}
    )
    assert tally.read == 12


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
    tally = ingest([str(csv_path), str(jsonl_path)], str(output), "auto", AUTO)
    assert rows_of(output) == [("http://a/1", "two\nlines"), ("http://a/4", "nulbyte"), ("http://a/6", "six")]
    assert +tally.dropped == Counter({"malformed line": 4, "not UTF-8": 2, "no caption": 1, "url not http(s)": 1})
    assert pq.read_table(output)["width"].to_pylist() == [None, None, 640]


def test_columns_of_laion_and_datacomp_are_carried(tmp_path: Path) -> None:
    laion = pa.table(
        {
            "URL": ["http://a/1"],
            "TEXT": ["one"],
            "WIDTH": pa.array([640], pa.int32()),
            "HEIGHT": pa.array([None], pa.int32()),
            "similarity": [0.5],
            "punsafe": [0.25],
        }
    )
    datacomp = pa.table(
        {
            "uid": ["00f"],
            "url": ["http://a/2"],
            "text": ["two"],
            "original_width": pa.array([800], pa.int64()),
            "original_height": pa.array([600], pa.int64()),
            "clip_l14_similarity_score": pa.array([0.75], pa.float32()),
            "sha256": ["abc"],
        }
    )
    for name, table in (("laion", laion), ("datacomp", datacomp)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    output = tmp_path / "urls.out"
    ingest([str(tmp_path / "laion.parquet"), str(tmp_path / "datacomp.parquet")], str(output), "auto", AUTO)
    first, second = pq.read_table(output).to_pylist()
    assert (first["width"], first["height"], first["similarity"], first["punsafe"]) == (640, None, 0.5, 0.25)
    assert second == {
        "uid": "00f", "url": "http://a/2", "caption": "two", "width": 800, "height": 600, "sha256": "abc",
        "similarity": 0.75, "punsafe": None,
    }  # fmt: skip


def test_named_columns_win(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("url,caption,photo,alt\nhttp://a/1,no,http://a/2,yes\n")
    output = tmp_path / "urls.parquet"
    ingest([str(path)], str(output), "auto", ColumnChoice(url="photo", caption="alt"))
    assert rows_of(output) == [("http://a/2", "yes")]


def test_many_small_blocks_become_few_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "cc12m.tsv"
    path.write_text("".join(f"http://a.example/{index}.jpg\tcaption {index}\n" for index in range(120_000)))
    output = tmp_path / "urls.parquet"
    ingest([str(path)], str(output), "auto", AUTO)
    file = pq.ParquetFile(output)
    assert file.metadata.num_row_groups <= 2
    assert file.read(["caption"])["caption"].to_pylist() == [f"caption {index}" for index in range(120_000)]


@pytest.mark.parametrize(
    ("name", "content", "choice", "message"),
    [
        ("list.csv", b"ulr,caption\nx,y\n", AUTO, "did you mean 'ulr'"),
        ("list.csv", b"url,caption\nx,y\n", ColumnChoice(caption="captoin"), "did you mean 'caption'"),
        ("list.csv", b"", AUTO, "no column"),
        ("list.tsv", b"a\thttp://b/1\n", ColumnChoice(url="url"), "no header"),
        ("list.parquet", b"not parquet", AUTO, "parquet"),
        ("list.tsv", b"a\tb\nc\td\n", AUTO, "2 url not http"),
        ("list.tsv", b"", AUTO, r"."),
        ("list.xyz", b"a\tb\n", AUTO, "--format"),
    ],
)
def test_unusable_lists_are_refused_and_leave_nothing(
    tmp_path: Path, name: str, content: bytes, choice: ColumnChoice, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        ingest([str(tmp_path / name)], str(tmp_path / "out.parquet"), "auto", choice)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_run_keeps_the_former_output(tmp_path: Path) -> None:
    output = tmp_path / "urls.parquet"
    ingest([str(write_list(tmp_path, "cc3m"))], str(output), "auto", AUTO)
    before = output.read_bytes()
    with pytest.raises(UserError, match="no such file"):
        ingest([str(tmp_path / "absent.tsv")], str(output), "auto", AUTO)
    assert output.read_bytes() == before


def test_the_formats_offered_are_the_formats_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    from data_prep.__main__ import main

    with pytest.raises(SystemExit):
        main(["ingest", "--help"])
    assert "{" + ",".join(["auto", *FORMATS]) + "}" in "".join(capsys.readouterr().out.split())


TEXT = st.one_of(st.none(), st.binary(max_size=12), st.sampled_from([b"http://a/b", b"https://x", b" HTTP://q "]))


def usable(url: bytes | None, caption: bytes | None) -> tuple[str, str] | None:
    """The rule for one row, without Arrow."""
    try:
        texts = [(value or b"").decode("utf-8") for value in (url, caption)]
    except UnicodeDecodeError:
        return None
    address, words = (text.strip() for text in texts)
    scheme, separator, rest = address.partition("://")
    plain = rest and rest[0] != "/" and not any(character in "\t\n\v\f\r " for character in rest)
    return (address, words) if scheme.lower() in ("http", "https") and separator and plain and words else None


@given(st.lists(st.tuples(TEXT, TEXT), max_size=12))
def test_canonicalise_equals_the_rule_for_one_row(rows: list[tuple[bytes | None, bytes | None]]) -> None:
    table = pa.table(
        {
            "url": pa.array([url for url, _ in rows], pa.binary()),
            "caption": pa.array([caption for _, caption in rows], pa.binary()),
        }
    )
    dropped: Counter[str] = Counter()
    canonical = canonicalise(table, dropped)
    expected = [row for row in (usable(*row) for row in rows) if row]
    got = zip(canonical["url"].to_pylist(), canonical["caption"].to_pylist(), strict=True)
    assert list(got) == expected
    assert dropped.total() == len(rows) - len(expected)
