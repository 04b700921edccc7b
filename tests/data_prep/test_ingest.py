from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_helpers import KEEP_ALL, done, of_format, read, rows_of

from data_prep.__main__ import main
from data_prep.errors import UserError
from data_prep.lists.block_lists import BlockList, read_block_lists
from data_prep.lists.canonical import SCHEMA, Rejects, canonicalise
from data_prep.lists.catalogue import INGESTIBLE, SOURCES
from data_prep.lists.cleaning import canonical_url
from data_prep.lists.ingest import ingest
from data_prep.lists.ingest_parts import Options
from data_prep.lists.list_files import ListFormat
from data_prep.lists.row_filters import Filters

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
        ({"url": ["http://a/1"], "caption": ["x"], "width": [{"pixels": 3}]}, "list.parquet: .*cast"),
    ],
)
def test_parquet_of_another_kind_is_refused_by_name(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=message):
        ingest([str(tmp_path / "list.parquet")], str(tmp_path / "out.parquet"))


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


def test_limits_on_published_columns(tmp_path: Path) -> None:
    columns = {
        "width": [400, 90, 400, None, 400, 400, 400, 400, 400, 400],
        "height": [300, 300, 100, 300, 300, 300, 300, 300, 300, 300],
        "similarity": [0.3, 0.3, 0.3, 0.3, 0.29, None, 0.3, 0.3, 0.3, 0.3],
        "aesthetic": [5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 4.5, 5.0, 5.0, 5.0],
        "punsafe": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1],
        "pwatermark": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.5],
        "language": ["en"] * 9 + ["de"],
    }
    names = [f"http://a/{index}" for index in range(10)]
    pq.write_table(pa.table({"url": names, "caption": names, **columns}), tmp_path / "list.parquet")
    limits = Filters(
        min_side=100, max_aspect=3, min_similarity=0.3, min_aesthetic=5, max_punsafe=0.1, max_watermark=0.5,
        languages=("en", "fr"),
    )  # fmt: skip
    tally = done(ingest([str(tmp_path / "list.parquet")], str(tmp_path / "urls.parquet"), Options(filters=limits)))
    assert rows_of(tmp_path / "urls.parquet") == [("http://a/0", "http://a/0")]
    assert +tally.dropped == Counter(
        {
            "image too small": 1, "image too narrow": 1, "size unknown": 1, "similarity too low": 1,
            "similarity unknown": 1, "aesthetic too low": 1, "punsafe too high": 1, "watermark too high": 1,
            "another language": 1,
        }
    )  # fmt: skip


def test_limits_on_captions_and_guessed_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    captions = ["ein kleiner roter Hund auf der Wiese", "a small red dog on the grass", "dog", "a dog " * 9]
    path = tmp_path / "list.tsv"
    path.write_text("".join(f"http://a/{index}\t{caption}\n" for index, caption in enumerate(captions)))
    limits = Filters(min_caption_chars=4, max_caption_chars=40, min_caption_words=2, languages=("en",))
    tally = done(ingest([str(path)], str(tmp_path / "urls.parquet"), Options(filters=limits)))
    assert rows_of(tmp_path / "urls.parquet") == [("http://a/1", captions[1])]
    assert +tally.dropped == Counter({"caption too short": 1, "caption too long": 1, "another language": 1})


def test_a_block_list_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "block.txt").write_bytes(b"a.example\nb\xfccher.example\n")
    with pytest.raises(UserError, match=r"block.txt, line 2: not UTF-8"):
        read_block_lists([str(tmp_path / "block.txt")])


def test_block_lists(tmp_path: Path) -> None:
    block = tmp_path / "block.txt"
    digest = "ab" * 32
    block.write_text(f"# taken down\nHTTP://A.example/gone.jpg\nBad.example  # and all below\n\n{digest.upper()}\n")
    urls = [
        "http://a.example/gone.jpg",
        "http://a.example/2",
        "http://x.bad.example/3",
        "http://notbad.example/4",
        "http://a/5",
    ]
    columns = {"url": urls, "caption": ["x"] * 5, "sha256": [None, None, None, None, digest]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    filters = Filters(block=read_block_lists([str(block)]))
    tally = done(ingest([str(tmp_path / "list.parquet")], str(tmp_path / "urls.parquet"), Options(filters=filters)))
    assert [url for url, _ in rows_of(tmp_path / "urls.parquet")] == [urls[1], urls[3]]
    assert +tally.dropped == Counter({"url blocked": 1, "host blocked": 1, "sha256 blocked": 1})
    block.write_text("fine.example\nnot a host\n")
    with pytest.raises(UserError, match="line 2"):
        read_block_lists([str(block)])


def test_the_formats_offered_are_those_of_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ingest", "--help"])
    offered = "".join(capsys.readouterr().out.split())
    assert "{" + ",".join(["auto", "tsv", "csv", "jsonl", "parquet", *INGESTIBLE]) + "}" in offered
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
