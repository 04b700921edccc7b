"""The reader of manifest.jsonl: any bytes give lines or the project's own error."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.errors import UserError
from formats.files import read_json_lines
from formats.manifest import Shard, find_shards, read_manifest

FILES = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)
FIELDS = ["shard", "samples", "bytes", "sha256", "skip", "skipped", "truncated", "unknown_members", "rules"]
GOOD = {"shard": "00000.tar", "samples": 1, "bytes": 10240, "sha256": "ab", "skip": ["x"], "rules": 1}
KEYS = st.lists(st.text(max_size=5), min_size=1, max_size=4)


def read(directory: Path, content: bytes) -> list[Shard] | None:
    """The lines, or None; nothing but the project's own error may be raised."""
    (directory / "manifest.jsonl").write_bytes(content)
    with contextlib.suppress(UserError):
        return list(read_manifest(directory).shards)
    return None


@FILES
@given(st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    read(tmp_path, content)


@FILES
@given(st.lists(JSON | st.dictionaries(st.sampled_from(FIELDS), JSON), max_size=3))
def test_any_json(tmp_path: Path, values: list[Any]) -> None:
    read(tmp_path, "\n".join(json.dumps(value) for value in values).encode())


@FILES
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_one_wrong_field(tmp_path: Path, field: str, value: object) -> None:
    read(tmp_path, json.dumps({**GOOD, field: value}).encode())


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"shard": "a.tar", "samples": Infinity, "bytes": 1}',
        b'{"shard": "a.tar", "samples": 1e400, "bytes": 1}',
        b'{"shard": "../a.tar", "samples": 1, "bytes": 1}',
        b'{"shard": "a.tar", "samples": -1, "bytes": 1}',
        b'{"shard": "a.tar", "samples": 1, "bytes": 1}\n' * 2,
        b'{"shard": "a.tar", "samples": ' + b"9" * 5000 + b', "bytes": 1}',
        b"null",
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: bytes) -> None:
    assert read(tmp_path, line) is None
    with pytest.raises(UserError, match=r"manifest.jsonl line \d+ is not a manifest line"):
        read_manifest(tmp_path)


@given(
    samples=st.integers(0, 1 << 40),
    skipped=st.dictionaries(st.text(min_size=1, max_size=9), KEYS, max_size=3),
    truncated=st.booleans(),
    unknown=st.integers(0, 9),
)
def test_what_is_written_is_read_again(
    samples: int, skipped: dict[str, list[str]], truncated: bool, unknown: int
) -> None:
    line = Shard("00001.tar", samples, 512, "ab", skipped, truncated, unknown)
    again = Shard.from_json(json.loads(json.dumps(line.to_json())))
    assert again == line
    assert again.skip == frozenset(key for keys in skipped.values() for key in keys)


def test_a_line_of_another_writer(tmp_path: Path) -> None:
    (line,) = read(tmp_path, b'{"shard": "a.tar", "samples": 1, "bytes": 512, "skip": ["k"], "more": 1}') or []
    assert (line.skip, line.skipped_samples, line.rules) == (frozenset({"k"}), 1, 0)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_other_damaged_files_of_lines_are_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "provenance.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"provenance.jsonl line 1"):
        read_json_lines(tmp_path / "provenance.jsonl")


def test_a_pipe_among_shards_is_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").touch()
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"x\.tar is no file"):
        find_shards(tmp_path)
