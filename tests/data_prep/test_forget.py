from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_images import good_sample, write_tar
from make_shards import assert_consistent, captions, make_shards, manifest, picture, sample

from data_prep.__main__ import main
from data_prep.forget import read_list
from data_prep.shards.verify import verify
from data_prep.web.ledger import write_ledger
from formats.errors import UserError


def forget(directory: Path, kind: str, text: str, max_removed: str = "1") -> int:
    path = directory.with_name("list.txt")
    path.write_text(text)
    command = ["forget", str(directory), f"--{kind}", str(path), "--processes", "1", "--max-removed", max_removed]
    return main(command)


def numbers(directory: Path) -> list[int]:
    return [int(caption.split()[2].rstrip(",")) for caption in captions(directory)]


def records(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "forgotten.jsonl").read_text().splitlines()]


def test_a_list_that_names_more_than_a_share_removes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make_shards(tmp_path / "shards", [4, 1, 4])
    before = captions(directory)
    assert forget(directory, "host", "example.org\n", max_removed="0.5") == 2
    assert "9 of 9 samples would be removed, more than --max-removed 0.5" in capsys.readouterr().err
    assert captions(directory) == before


def test_a_host_goes_with_everything_below_it(tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "shards", [4, 1, 4])
    before = manifest(directory)
    assert forget(directory, "host", "# people asked\n\nHOST1.example.org.\n") == 0
    assert numbers(directory) == [0, 2, 3, 5, 6, 8]
    assert_consistent(directory)
    after = manifest(directory)
    assert after[1] != before[1]  # number 4 was its only sample
    assert after[1]["samples"] == 0
    assert [(r["shard"], r["key"], r["by"], r["list"]) for r in records(directory)] == [
        (shard, f"{n:09d}", "host", "list.txt") for shard, n in (("00000.tar", 1), ("00001.tar", 4), ("00002.tar", 7))
    ]
    assert "cat" not in (directory / "forgotten.jsonl").read_text()
    assert verify(directory, 1, max_bad_ratio=0.0, again=True)
    assert forget(directory, "host", "example.org\n") == 0
    assert numbers(directory) == []
    assert len(records(directory)) == 9


@pytest.mark.parametrize("entry", ["ample.org", "host1.example.org.evil.com", "1.example.org"])
def test_a_host_is_no_substring(tmp_path: Path, entry: str) -> None:
    directory = make_shards(tmp_path / "shards", [3])
    before = manifest(directory)
    assert forget(directory, "host", entry) == 0
    assert manifest(directory) == before
    assert not (directory / "forgotten.jsonl").exists()


@pytest.mark.parametrize(
    ("entry", "forgotten"),
    [
        ("https://host1.example.org/1.jpg", True),
        ("http://HOST1.example.org:80/1.jpg#top", True),
        ("https://host1.example.org/1.JPG", False),
        ("https://host1.example.org/1.jpg?size=2", False),
        ("https://host1.example.org/", False),
    ],
)
def test_addresses_are_compared_by_what_they_name(tmp_path: Path, entry: str, forgotten: bool) -> None:
    directory = make_shards(tmp_path / "shards", [3])
    assert forget(directory, "url", entry + "\n") == 0
    assert numbers(directory) == ([0, 2] if forgotten else [0, 1, 2])


@pytest.mark.parametrize(("kind", "entry"), [("host", "Bücher.example"), ("url", "http://BÜCHER.example/a/../ä.jpg")])
def test_addresses_are_written_as_people_write_them(tmp_path: Path, kind: str, entry: str) -> None:
    directory = tmp_path / "shards"
    write_tar(directory / "00000.tar", [*sample(0), *sample(1, url="https://xn--bcher-kva.example/%C3%A4.jpg")])
    verify(directory, 1, max_bad_ratio=0.0)
    assert forget(directory, kind, entry) == 0
    assert numbers(directory) == [0]


def test_hashes_of_the_original_and_of_the_stored_picture(tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    published = hashlib.sha256(b"the original file").hexdigest()
    members = [*sample(0, sha256=published), *sample(1), *sample(2)]
    write_tar(directory / "00000.tar", members)
    verify(directory, 1, max_bad_ratio=0.0)
    stored = hashlib.sha256(picture(2)).hexdigest()
    assert forget(directory, "sha256", f"{published.upper()}\n{stored}\n") == 0
    assert numbers(directory) == [1]


def test_unusable_samples_and_the_quarantine_are_searched_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "shards"
    bad = [(name, content if not name.endswith("jpg") else b"") for name, content in sample(1)]
    write_tar(directory / "00000.tar", [*sample(0), *bad])
    write_tar(directory / "00001.tar", bad)
    write_tar(directory / "00002.tar", sample(2))
    (directory / "00002.tar").write_bytes((directory / "00002.tar").read_bytes()[:-10_000])
    verify(directory, 1, max_bad_ratio=1.0)
    assert main(["verify", str(directory), "--repair", "--processes", "1", "--max-bad-ratio", "1"]) == 0
    assert sorted(path.name for path in (directory / "quarantine").iterdir()) == ["00001.tar", "00002.tar"]
    assert forget(directory, "url", "https://host1.example.org/1.jpg") == 0
    assert [path.name for path in (directory / "quarantine").iterdir()] == ["00002.tar"]
    assert "cannot be searched" in capsys.readouterr().out


def test_metadata_of_any_kind_is_no_problem(tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    metadata = [b"[]", b"{", b"\xff", b'{"url": 7}', b'{"url": "http://["}', b'{"url": null}', b"[" * 100_000]
    for number, content in enumerate(metadata):
        members = [*good_sample(f"{number}")[:2], (f"{number}.json", content)]
        write_tar(directory / f"{number:05d}.tar", members)
    verify(directory, 1, max_bad_ratio=0.0)
    before = manifest(directory)
    for kind, entry in (("host", "a.example"), ("url", "http://a.example/"), ("sha256", "0" * 64)):
        assert forget(directory, kind, entry) == 0
    assert manifest(directory) == before


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sha256", "abc\n"),
        ("sha256", "g" * 64),
        ("url", "example.org/1.jpg"),
        ("url", "ftp://example.org/"),
        ("host", "https://example.org/"),
        ("host", "two words"),
        ("host", "# nothing\n"),
    ],
)
def test_a_list_of_something_else_is_refused(tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match="list"):
        read_list(tmp_path / "list", kind)  # type: ignore[arg-type]


def write_download(directory: Path) -> None:
    """Shards with the ledger that a download leaves beside them: one url per sample, and one that failed."""
    (lines,) = [manifest(directory)]
    listed = pa.schema({"uid": pa.string(), "url": pa.string(), "caption": pa.string()})
    rows = [
        {
            "uid": str(n),
            "url": f"https://host{n}.example.org/{n}.jpg",
            "caption": f"a cat {n}",
            "key": f"{n:09d}",
            "shard": lines[0]["shard"],
            "class": "ok" if n < lines[0]["samples"] else "dns",
            "error_message": None if n < lines[0]["samples"] else "host name not found",
            "sha256": hashlib.sha256(str(n).encode()).hexdigest(),
        }
        for n in range(lines[0]["samples"] + 2)
    ]
    write_ledger(directory / "00000.parquet", pa.Table.from_pylist(rows, listed), rows)
    (directory / "download.html").write_text("https://host1.example.org/1.jpg")


@pytest.mark.parametrize("kind", ["host", "url", "sha256"])
def test_the_ledger_forgets_too_and_nothing_is_tried_again(tmp_path: Path, kind: str) -> None:
    directory = make_shards(tmp_path / "shards", [3])
    write_download(directory)
    before = pq.read_table(directory / "00000.parquet")
    named = (1, 3)  # one that is in a shard, one that failed
    entry = {"host": "host{}.example.org", "url": "https://host{0}.example.org/{0}.jpg"}.get(kind)
    entries = [entry.format(n) if entry else hashlib.sha256(str(n).encode()).hexdigest() for n in named]
    assert forget(directory, kind, "\n".join(entries)) == 0
    after = pq.read_table(directory / "00000.parquet")
    assert after.schema == before.schema
    assert after["class"] == before["class"]
    assert [n for n, url in enumerate(after["url"].to_pylist()) if not url] == list(named)
    for row, was in zip(after.to_pylist(), before.to_pylist(), strict=True):
        blank = {"url": "", "caption": "", "sha256": None, "listed_sha256": None, "error_message": "forgotten"}
        assert row == (was if row["url"] else was | blank)
    if kind != "sha256":  # the samples here have other hashes than these rows
        assert b"host1.example.org" not in b"".join(path.read_bytes() for path in directory.glob("*.*"))
    assert not (directory / "download.html").exists()


def test_a_byte_order_mark_is_no_part_of_the_first_entry(tmp_path: Path) -> None:
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig")):
        (tmp_path / name).write_text("a.example\nb.example\n", encoding=encoding)
    assert read_list(tmp_path / "plain", "host").entries == read_list(tmp_path / "marked", "host").entries
