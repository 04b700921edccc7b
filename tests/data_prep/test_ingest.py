"""`data-prep ingest`: lists of every format become one table; what is no list is refused and leaves nothing."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
from collections import Counter
from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_helpers import KEEP_ALL, done, of_format, read, rows_of

from data_prep.__main__ import main
from data_prep.lists.catalogue import INGESTIBLE, SOURCES
from data_prep.lists.filters import BlockList, Filters
from data_prep.lists.ingest import ingest
from data_prep.lists.list_files import ListFormat
from data_prep.lists.rows import SCHEMA, Options
from formats.errors import UserError

ROWS = [
    ("http://a.example/1.jpg", 'a "quoted" cat, sitting'),
    ("https://b.example/2.png?x=1&y=2", "un chien à côté"),
    ("http://c.example/3", "'single' and , comma"),
]


BLOCKS_A_HASH = Options(filters=Filters(block=BlockList(sha256s=frozenset({"a" * 64}))))


def write_list(folder: Path, kind: str) -> Path:
    path = folder / {"cc3m": "cc3m.tsv", "cc12m": "cc12m.tsv", "header": "header.tsv"}.get(kind, f"list.{kind}")
    if kind == "cc3m":
        path.write_text("".join(f"{caption}\t{url}\n" for url, caption in ROWS), encoding="utf-8")
    elif kind == "cc12m":
        path.write_text("".join(f"{url}\t{caption}\n" for url, caption in ROWS), encoding="utf-8")
    elif kind == "header":
        lines = "".join(f"{index}\t{caption}\t{url}\n" for index, (url, caption) in enumerate(ROWS))
        path.write_text("id\tcaption\turl\n" + lines, encoding="utf-8")
    elif kind == "tsv.gz":
        text = "".join(f"{url}\t{caption}\n" for url, caption in ROWS)
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("id", "caption", "url"), *((7, c, u) for u, c in ROWS)])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"url": u, "text": c}) + "\n" for u, c in ROWS))
    elif kind == "csv.xz":
        path.write_bytes(lzma.compress(write_list(folder, "csv").read_bytes()))
    else:
        pq.write_table(pa.table({"URL": [u for u, _ in ROWS], "TEXT": [c for _, c in ROWS]}), path)
    return path


@pytest.mark.parametrize("kind", ["cc3m", "cc12m", "header", "tsv.gz", "csv", "csv.xz", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out" / "urls.parquet"
    tally = done(ingest([str(write_list(tmp_path, kind))], str(output)))
    assert rows_of(output) == ROWS
    assert (tally.read, tally.written, +tally.dropped) == (3, 3, Counter())
    uids = read(output)["uid"].to_pylist()
    assert uids == [hashlib.sha256(f"{u}\n{c}".encode()).hexdigest()[:32] for u, c in ROWS]


def test_folders_and_patterns_of_several_lists(tmp_path: Path) -> None:
    for kind in ("cc3m", "csv", "jsonl"):
        write_list(tmp_path, kind)
    (tmp_path / "notes.md").write_text("not a list")
    output = tmp_path / "urls"
    assert done(ingest([str(tmp_path)], str(output), KEEP_ALL)).written == 9
    assert rows_of(output) == ROWS * 3
    assert done(ingest([str(tmp_path / "*.tsv"), str(tmp_path / "list.csv")], str(output), KEEP_ALL)).written == 6
    assert done(ingest([str(tmp_path)], str(output))).written == 3


def test_paths_of_other_filesystems() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/lists/cc12m.tsv", b"http://a.example/1.jpg\ta cat\n")
    for output, file in (
        ("memory://out/urls.parquet", "/out/urls.parquet"),
        ("memory://dir", "/dir/part-00000.parquet"),
    ):
        ingest(["memory://lists/cc12m.tsv"], output)
        with memory.open(file) as stream:
            assert pq.read_table(stream)["caption"].to_pylist() == ["a cat"]
    names = {path.rsplit("/", 1)[-1] for path in memory.ls("/out", detail=False)}
    assert names == {"urls.parquet", "urls.ingest.json", "urls.rejects.jsonl"}


def test_columns_of_laion_datacomp_and_coyo_are_carried(tmp_path: Path) -> None:
    laion = {
        "URL": ["http://a/1"], "TEXT": ["one"], "WIDTH": pa.array([640.0]), "HEIGHT": pa.array([float("nan")]),
        "similarity": [0.5], "punsafe": [0.25], "pwatermark": [0.75], "LANGUAGE": ["de"],
    }  # fmt: skip
    datacomp = {
        "uid": ["00f"], "url": ["http://a/2"], "text": ["two"], "original_width": pa.array([800], pa.int64()),
        "original_height": pa.array([2**40]), "clip_l14_similarity_score": pa.array([0.75], pa.float32()),
        "sha256": ["abc"], "face_bboxes": [[[0.0, 0.25, 0.5, 1.0]]],
    }  # fmt: skip
    coyo = {"url": ["http://a/3"], "text": ["three"], "aesthetic_score_laion_v2": [5.5], "watermark_score": [0.5]}
    for name, columns in (("a", laion), ("b", datacomp), ("c", coyo)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    output = tmp_path / "urls"
    ingest([str(tmp_path)], str(output))
    first, second, third = read(output).to_pylist()
    nothing = dict.fromkeys(SCHEMA.names)
    assert first == nothing | {
        "uid": first["uid"], "url": "http://a/1", "caption": "one", "width": 640, "similarity": 0.5, "punsafe": 0.25,
        "watermark": 0.75, "language": "de",
    }  # fmt: skip
    assert second == nothing | {
        "uid": "00f", "url": "http://a/2", "caption": "two", "width": 800, "sha256": "abc", "similarity": 0.75,
        "face_bboxes": [[0.0, 0.25, 0.5, 1.0]],
    }  # fmt: skip
    assert (third["aesthetic"], third["watermark"]) == (5.5, 0.5)


def test_named_columns_win(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("url,caption,photo,alt\nhttp://a/1,no,http://a/2,yes\n")
    output = tmp_path / "urls.parquet"
    ingest([str(path)], str(output), of_format("auto", url="photo", caption="alt"))
    assert rows_of(output) == [("http://a/2", "yes")]


def test_many_small_blocks_become_few_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "cc12m.tsv"
    path.write_text("".join(f"http://a.example/{index}.jpg\tcaption {index}\n" for index in range(220_000)))
    output = tmp_path / "urls.parquet"
    ingest([str(path)], str(output))
    file = pq.ParquetFile(output)
    assert file.metadata.num_row_groups <= 3
    assert file.read(["caption"])["caption"].to_pylist() == [f"caption {index}" for index in range(220_000)]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("list.csv", b"ulr,caption\nx,y\n", KEEP_ALL, "did you mean 'ulr'"),
        ("list.csv", b"url,caption\nx,y\n", of_format("auto", caption="captoin"), "did you mean 'caption'"),
        ("list.csv", b"", KEEP_ALL, "no column"),
        ("list.tsv", b"a\thttp://b/1\n", of_format("auto", url="url"), "no header"),
        ("list.tsv", b"a\thttp://b/1\n", of_format("cc3m", url="url"), "no header"),
        ("list.parquet", b"not parquet", KEEP_ALL, "parquet"),
        ("list.tsv", b"a\tb\nc\td\n", KEEP_ALL, "2 url not http"),
        ("list.tsv", b"", KEEP_ALL, "empty"),
        ("list.xyz", b"a\tb\n", KEEP_ALL, "--format"),
        ("list.tsv", b"a\tb\n", of_format("flickr30k"), "data-prep pack"),
        ("list.csv", b"url,caption\nhttp://a/1,y\n", Options(filters=Filters(min_similarity=0.3)), "--min-similarity"),
        ("list.csv", b"url,caption,width\nhttp://a/1,y,3\n", Options(filters=Filters(min_side=9)), "column height"),
        ("list.csv", b"url,caption\nhttp://a/1,y\n", BLOCKS_A_HASH, "needs a column sha256"),
    ],
)  # fmt: skip
def test_unusable_lists_are_refused_and_leave_nothing(
    tmp_path: Path, name: str, content: bytes, options: Options, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        ingest([str(tmp_path / name)], str(tmp_path / "out.parquet"), options)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_run_keeps_the_former_output(tmp_path: Path) -> None:
    output = tmp_path / "urls.parquet"
    ingest([str(write_list(tmp_path, "cc3m"))], str(output))
    before = output.read_bytes()
    with pytest.raises(UserError, match="no such file"):
        ingest([str(tmp_path / "absent.tsv")], str(output))
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"url": [1], "caption": ["x"]}, "url holds int64, not text"),
        ({"url": ["http://a/1"], "caption": [["x"]]}, "caption holds list"),
        ({"url": ["http://a/1"], "text2": ["x"]}, "no column named caption"),
    ],
)
def test_parquet_of_another_kind_is_refused_by_name(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=message):
        ingest([str(tmp_path / "list.parquet")], str(tmp_path / "out.parquet"))


@pytest.mark.parametrize(
    ("captions", "texts"),
    [([1984, 7, None], ["1984", "7"]), ([Decimal("2.50"), Decimal("7.00"), None], ["2.50", "7.00"])],
)
def test_captions_of_parquet_may_be_numbers(
    tmp_path: Path, captions: list[int | Decimal | None], texts: list[str]
) -> None:
    columns = {"url": [f"http://a.example/{n}.jpg" for n in range(3)], "caption": captions}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    tally = done(ingest([str(tmp_path / "list.parquet")], str(tmp_path / "urls.parquet"), KEEP_ALL))
    assert [caption for _, caption in rows_of(tmp_path / "urls.parquet")] == texts
    assert +tally.dropped == Counter({"no caption": 1})


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_damaged_report_is_made_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "list.tsv").write_text("http://a.example/1.jpg\ta cat\n")
    output = tmp_path / "urls.parquet"
    for _ in range(2):
        assert done(ingest([str(tmp_path / "list.tsv")], str(output))).written == 1
        (tmp_path / "urls.ingest.json").write_text(content)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    path, output = write_list(tmp_path, "cc3m"), tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for target in (output, path):
        with pytest.raises(UserError, match=r"thesis\.tex|is a file"):
            ingest([str(path)], str(target))
    assert (output / "thesis.tex").read_text() == "years of work"
    (output / "thesis.tex").unlink()
    assert done(ingest([str(path)], str(output))).written == 3
    assert done(ingest([str(path)], str(output), KEEP_ALL)).written == 3  # its own parts are replaced


def test_withdrawn_metadata_is_refused(tmp_path: Path) -> None:
    columns = {"URL": ["http://a/1"], "TEXT": ["one"], "hash": [1], "punsafe": [0.1], "pwatermark": [0.1]}
    path = tmp_path / "part-00000.parquet"
    pq.write_table(pa.table(columns), path)
    output = str(tmp_path / "urls.parquet")
    for options in (Options(), of_format("parquet"), of_format("laion-5b")):
        with pytest.raises(UserError, match=r"withdrawn.*re-laion-5b.*--i-have-a-cleaned-copy"):
            ingest([str(path)], output, options)
    assert done(ingest([str(path)], output, of_format("re-laion-5b"))).written == 1
    assert done(ingest([str(path)], output, Options(ListFormat(cleaned_copy=True)))).written == 1
    plain = tmp_path / "laion400m-meta"
    plain.mkdir()
    with pytest.raises(UserError, match="LAION-400M"):
        ingest([str(write_list(plain, "parquet"))], output)


def test_the_formats_offered_are_those_of_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ingest", "--help"])
    offered = "".join(capsys.readouterr().out.split())
    assert all(name in offered for name in ["auto", "tsv", "csv", "jsonl", "parquet", *INGESTIBLE])
    assert main(["sources"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in SOURCES)
    assert main(["sources", "cc12m", "laion-5b"]) == 0
    assert "12,423,374" in capsys.readouterr().out
    assert main(["sources", "cc12"]) == 2
    assert "did you mean 'cc12m'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["3", "3/3", "-1/2", "a/b", "0/0"])
def test_slices_are_checked(value: str) -> None:
    with pytest.raises(SystemExit):
        main(["ingest", "x.tsv", "--output", "y.parquet", f"--slice={value}"])
