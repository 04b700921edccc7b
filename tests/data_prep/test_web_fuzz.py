"""Whatever servers and lists say: no shard is lost, every url has one outcome, and the counts add up."""

from __future__ import annotations

import gzip
import itertools
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_images import encoded
from raw_web import RawWeb, answer

from data_prep.web.download import check_list
from data_prep.web.ledger import MEANING, count_outcomes
from data_prep.web.passes import Pass, Settings
from data_prep.web.shard_worker import ShardWorker
from formats.errors import UserError

pytestmark = pytest.mark.slow

PHOTO = encoded(3, size=24)
SETTINGS = Settings(
    image_size=16, samples_per_shard=50, threads=16, timeout_s=1.0, deadline_s=2.0, max_bytes=100_000, retries=0,
    host_requests_per_s=1e6, allow_local=True,
)  # fmt: skip
HOSTS = itertools.count(2)  # one for each example: robots.txt and failures are remembered


@pytest.fixture(scope="module")
def web() -> Iterator[RawWeb]:
    with RawWeb() as server:
        yield server


WORDS = st.one_of(
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\r", b"?").replace(b"\n", b"!")),
    st.sampled_from([b"identity", b"GZIP, gzip", b"x-gzip", b"\xe9t\xe9", b"\x00", b"x" * 60_000, b"chunked", b"-1"]),
)  # fmt: skip
NAMES = st.sampled_from(
    [b"Content-Encoding", b"X-Robots-Tag", b"Location", b"Retry-After", b"Content-Type", b"Content-Length",
     b"Set-Cookie", b"Transfer-Encoding", b"Content-Location", b"X-\xc3\xa9"]
)  # fmt: skip
STATUSES = st.one_of(
    st.sampled_from([b"200 OK", b"404 N\xe3o", b"301 \xff", b"429 \xf0\x9f", b"503", b"204 None", b"418 I\x00"]),
    st.integers(0, 1200).map(lambda code: b"%d x" % code),
    WORDS,
)  # fmt: skip
BODIES = st.one_of(
    st.sampled_from([PHOTO, PHOTO[:200], gzip.compress(PHOTO), b"", b"User-agent: *\nDisallow: /a", b"GIF89a\0"]),
    st.binary(max_size=60),
)  # fmt: skip
HEADERS = st.lists(st.tuples(NAMES, WORDS), max_size=4).map(lambda all: b"".join(b"%s: %s\r\n" % pair for pair in all))
ANSWERS = st.one_of(st.builds(answer, STATUSES, HEADERS, BODIES), st.binary(max_size=80))


def not_json(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def fill(folder: Path, urls: Path, rows: int) -> list[dict[str, Any]]:
    """Download a list as one shard, in this process; the ledger, after it was held against tar and statistics."""
    one = Pass(attempt=1, urls=urls, rows=rows, classes=(), first_shard=0, samples_per_shard=50)
    (folder / "_tmp").mkdir()
    done, _ = ShardWorker(folder, one, SETTINGS)((0, (0, rows)))
    assert done
    step = {"step": "download", "urls": urls.name, "rows": rows, "samples_per_shard": 50}
    (folder / "provenance.jsonl").write_text(json.dumps(step))
    table = pq.read_table(folder / "00000.parquet")
    table.validate(full=True)
    classes = table["class"].to_pylist()
    assert len(classes) == rows
    assert set(classes) <= set(MEANING)
    assert count_outcomes(folder) == Counter(classes)
    with tarfile.open(folder / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    keys = [key for key, outcome in zip(table["key"].to_pylist(), classes, strict=True) if outcome == "ok"]
    assert {name.partition(".")[0] for name in members} == set(keys)
    for key in keys:
        json.loads(members[f"{key}.json"], parse_constant=not_json)
    return table.select(["url", "class"]).to_pylist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(ANSWERS, min_size=1, max_size=8), robots=st.one_of(st.none(), ANSWERS))
def test_whatever_a_server_answers(web: RawWeb, answers: list[bytes], robots: bytes | None) -> None:
    number = next(HOSTS)
    host, good_host = f"127.1.{number // 250}.{1 + number % 250}", f"127.2.{number // 250}.{1 + number % 250}"
    web.pages = {f"/{index}": content for index, content in enumerate(answers)}
    web.pages |= {"/good": answer(body=PHOTO)} | ({"/robots.txt": robots} if robots else {})
    urls = [web.url(f"/{index}", host) for index in range(len(answers))]
    columns = {"url": urls, "uid": [str(n) for n in range(len(urls))], "caption": ["x"] * len(urls)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pq.write_table(pa.table(columns), folder / "urls.parquet")
        assert [row["url"] for row in fill(folder, folder / "urls.parquet", len(urls))] == urls
    web.pages = {"/good": answer(body=PHOTO)}
    with tempfile.TemporaryDirectory() as scratch:  # and the process is as good as before
        folder = Path(scratch)
        row = {"url": [web.url("/good", good_host)], "uid": ["1"], "caption": ["x"]}
        pq.write_table(pa.table(row), folder / "urls.parquet")
        assert fill(folder, folder / "urls.parquet", 1) == [{"url": row["url"][0], "class": "ok"}]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
URLS = st.one_of(
    st.just("http://127.0.0.1:PORT/good"),
    TEXTS.map(lambda text: f"http://127.0.0.1:PORT/{text}"),
    TEXTS.map(lambda text: f"http://{text}/"),
    st.sampled_from(["http://[::1", "https://127.0.0.1:PORT/", "HTTP://10.0.0.1/", "http://a\x00b/", "http://127.0.0.1:99999/"]),
)  # fmt: skip
EXTRAS: list[pa.Array] = [
    pa.array([float("nan")] * 3),
    pa.array([[1.0, float("inf")], None, []]),
    pa.array([datetime(2020, 1, 1), None, None]),
    pa.array([10**14, 0, None], pa.timestamp("s")),  # a year that Python does not have
    pa.array([b"\xff", None, b""]),
    pa.array([Decimal("1.5"), None, None]),
    pa.array([{"a": [1, None]}, None, {"a": None}]),
    pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    pa.array(["x", None, "x"]).dictionary_encode(),
    pa.nulls(3),
    pa.array([2**63, 0, None], pa.uint64()),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    urls=st.lists(st.one_of(URLS, URLS, URLS, st.none()), min_size=3, max_size=3),
    captions=st.one_of(
        st.lists(TEXTS, min_size=3, max_size=3),
        st.sampled_from([["a", None, "b"], [1, 2, 3], [[], ["b"], []], [b"\xff", b"a", b""], ["\x00", "\ufeff", ""]])
    ),
    extra=st.sampled_from(EXTRAS),
    is_text=st.booleans(),
)  # fmt: skip
def test_whatever_a_list_holds(
    web: RawWeb, urls: list[str | None], captions: list[Any], extra: pa.Array, is_text: bool
) -> None:
    web.pages = {"/good": answer(body=PHOTO)}
    given_urls = [url and url.replace("PORT", str(web.port)) for url in urls]
    texts = pa.array(captions)
    if is_text and texts.type == pa.binary():  # what some writers call text
        texts = pa.StringArray.from_buffers(3, *texts.buffers()[1:])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = pa.table(
            {"uid": ["a", "b", "c"], "url": pa.array(given_urls, pa.string()), "caption": texts, "extra": extra}
        )
        pq.write_table(table, folder / "urls.parquet")
        asked = web.requests.total()
        try:
            check_list(folder / "urls.parquet", SETTINGS)
        except UserError:
            assert web.requests.total() == asked
        else:
            assert [row["url"] for row in fill(folder, folder / "urls.parquet", 3)] == given_urls


def test_the_oddest_columns_are_carried(web: RawWeb) -> None:
    web.pages = {"/good": answer(body=PHOTO)}
    for extra in EXTRAS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            table = pa.table(
                {"uid": ["a", "b", "c"], "url": [web.url("/good")] * 3, "caption": ["x"] * 3, "extra": extra}
            )
            pq.write_table(table, folder / "urls.parquet")
            check_list(folder / "urls.parquet", SETTINGS)
            assert {row["class"] for row in fill(folder, folder / "urls.parquet", 3)} == {"ok"}
            assert (
                pq.read_table(folder / "00000.parquet")["extra"].type
                == pq.read_table(folder / "urls.parquet")["extra"].type
            )
