"""`data-prep ingest` with limits on columns, captions and languages, and with block lists."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_helpers import done, rows_of

from data_prep.lists.filters import Filters, read_block_lists
from data_prep.lists.ingest import ingest
from data_prep.lists.rows import Options
from formats.errors import UserError


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
    block.write_text(  # with a byte order mark
        f"\ufeffHTTP://A.example/gone.jpg\n# taken down\nBad.example  # and all below\n\n{digest.upper()}\n"
    )
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
