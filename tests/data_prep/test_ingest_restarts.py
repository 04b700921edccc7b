"""Ingest in pieces: duplicates across them, slices, several processes, kills and restarts."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_helpers import KEEP_ALL, done, read, rows_of
from killed_at import kill_at

from data_prep.lists import list_files, rows
from data_prep.lists.filters import Filters
from data_prep.lists.ingest import Slice, ingest
from data_prep.lists.list_files import Piece
from data_prep.lists.rows import Options

pytestmark = pytest.mark.slow


def draw_lists(folder: Path, rows: int, seed: int) -> list[tuple[str, str]]:
    """Several lists with repeated urls, captions and pairs, and lines that cannot be used; returns the good rows."""
    rng = random.Random(seed)
    good = [(f"http://a.example/{rng.randrange(rows)}", f"caption {rng.randrange(rows // 2)}") for _ in range(rows)]
    half = rows // 2
    (folder / "a.tsv").write_text(
        "".join(f"{url}\t{text}\n" + "broken\n" * (i % 7 == 0) for i, (url, text) in enumerate(good[:half]))
    )
    table = pa.table({"url": [url for url, _ in good[half:]], "caption": [text for _, text in good[half:]]})
    pq.write_table(table, folder / "b.parquet", row_group_size=half // 5)
    return good


def first_of_each(rows: list[tuple[str, str]], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """One key after the other, each with a set."""
    for key in keys:
        seen: set[object] = set()
        kept = []
        for row in rows:
            value = {"url": row[0], "caption": row[1], "pair": row}[key]
            if value not in seen:
                kept.append(row)
            seen.add(value)
        rows = kept
    return rows


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(list_files, "PIECE_ROWS", 50)
    monkeypatch.setattr(rows, "ROWS_PER_PART", 20)


@pytest.mark.parametrize("keys", [(), ("url",), ("caption",), ("pair",), ("url", "caption"), ("caption", "url")])
@pytest.mark.usefixtures("small_pieces")
def test_duplicates_across_pieces_lists_and_keys_equal_a_set(tmp_path: Path, keys: tuple[str, ...]) -> None:
    good = draw_lists(tmp_path, 400, seed=1)
    for output in (tmp_path / "out.parquet", tmp_path / "out"):
        tally = done(ingest([str(tmp_path / "a.tsv"), str(tmp_path / "b.parquet")], str(output), Options(unique=keys)))
        assert rows_of(output) == first_of_each(good, keys)
        assert tally.dropped["malformed line"] == 29
    assert not list(tmp_path.glob("*-work"))


@pytest.mark.usefixtures("small_pieces")
def test_slices_unite_to_the_whole_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = draw_lists(tmp_path, 300, seed=2)
    sources, output = [str(tmp_path / "a.tsv"), str(tmp_path / "b.parquet")], tmp_path / "out"
    for index in (2, 0):
        assert ingest(sources, str(output), share=Slice(index, 3)) is None
    assert "pieces are missing" in capsys.readouterr().out
    assert not output.exists()
    assert ingest(sources, str(output), share=Slice(1, 3)) is None
    assert "0 of" in capsys.readouterr().out
    monkeypatch.setattr(Piece, "read", None)  # nothing is left to read
    assert done(ingest(sources, str(output))).written == len(first_of_each(good, ("url",)))
    assert rows_of(output) == first_of_each(good, ("url",))
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert done(ingest(sources, str(output))).read == 300 + 22
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}


@pytest.mark.usefixtures("small_pieces")
def test_a_list_or_limit_that_changed_is_read_anew(tmp_path: Path) -> None:
    good = draw_lists(tmp_path, 100, seed=3)
    sources, output = [str(tmp_path / "a.tsv")], tmp_path / "out.parquet"
    ingest(sources, str(output), KEEP_ALL)
    ingest(sources, str(output), Options(filters=Filters(min_caption_chars=10), unique=()))
    assert rows_of(output) == [row for row in good[:50] if len(row[1]) >= 10]
    with (tmp_path / "a.tsv").open("a") as stream:
        stream.write("http://new.example/1\tone more\n")
    ingest(sources, str(output), KEEP_ALL)
    assert rows_of(output) == [*good[:50], ("http://new.example/1", "one more")]


def test_killed_anywhere_and_started_again_gives_the_same(tmp_path: Path) -> None:
    rows = [(f"http://a.example/{index % 70_000}.jpg", f"caption number {index}") for index in range(100_000)]
    path = tmp_path / "list.tsv"
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in rows))
    code = (
        "import sys; from data_prep.lists import list_files; list_files.PIECE_BYTES = 300_000\n"
        "from data_prep.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    output, work = tmp_path / "urls", tmp_path / "urls.ingest-work"
    command = ["-c", code, "ingest", str(path), "--output", str(output), "--processes", "1"]
    for moment, number in (("*.json", 1), ("*-0.arrow", 3), ("*.json", 3), ("output-*", 1)):
        kill_at(work / moment, *command, number=number)
    assert subprocess.run([sys.executable, *command], check=False, capture_output=True).returncode == 0
    assert rows_of(output) == rows[:70_000]
    assert not list(tmp_path.glob("*-work"))


def test_several_processes_give_the_same_as_one(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        draw_lists_folder = tmp_path / name
        draw_lists_folder.mkdir()
        draw_lists(draw_lists_folder, 200, seed=ord(name))
    sources = [str(tmp_path / name) for name in "abc"]
    ingest(sources, str(tmp_path / "one.parquet"), processes=1)
    ingest(sources, str(tmp_path / "two"), processes=2)
    assert read(tmp_path / "one.parquet").equals(read(tmp_path / "two"))
