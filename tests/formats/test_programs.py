"""How programs end: one line for what a user can mend, a traceback for the rest, each with its exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from formats.errors import UserError, did_you_mean, nearest_of
from formats.files import read_json, read_text, write_atomically
from formats.programs import exit_code_of


def os_error(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such recipe"), "no such recipe"),
        (os_error(errno.ENOSPC, "run/run.json"), "run/run.json: cannot be written: no space left on the device; make"),
        (os_error(errno.ENOSPC), "a file cannot be written: no space left"),  # as fsync and os.write say it
        (os_error(errno.EACCES, "list.csv"), "list.csv: no permission"),
        (os_error(errno.EROFS, "out"), "out: cannot be written: the file system is read-only"),
        (os_error(errno.ELOOP, "a"), "a: its symbolic links lead in a circle"),
        (os_error(errno.EXDEV, "a"), f"a: {os.strerror(errno.EXDEV)}"),  # one without advice
        (FileNotFoundError("s3://bucket/nothing"), "s3://bucket/nothing"),  # as fsspec raises it
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "[Errno 104] Connection reset by peer"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    for rank, prefix in (("0", "error: "), ("3", "error (rank 3): ")):
        monkeypatch.setenv("RANK", rank)
        assert exit_code_of(work) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(prefix + line)
        assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [os_error(errno.EBADF), ValueError("a defect"), UnicodeError("a defect")])
def test_a_defect_shows_where_it_is(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    assert exit_code_of(work) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_reader_who_has_had_enough_is_no_error() -> None:
    code = "from formats.programs import run\nrun(lambda _: [print('x' * 99) for _ in range(9999)] and 0)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141


def in_the_way(path: Path) -> None:
    path.write_bytes(b"")


def in_a_circle(path: Path) -> None:
    path.symlink_to(path)


def without_parent(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_bytes(b"")


@pytest.mark.parametrize("spoil", [in_the_way, in_a_circle, without_parent])
@pytest.mark.parametrize("work", [lambda path: path.mkdir(exist_ok=True), lambda path: (path / "x").read_bytes()])
def test_real_errors_name_their_path(
    spoil: Callable[[Path], None],
    work: Callable[[Path], object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "folder" / "name"
    path.parent.mkdir()
    spoil(path)
    assert exit_code_of(lambda: bool(work(path)) * 0) == 2
    assert f"error: {path}" in capsys.readouterr().err


def test_a_text_in_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"base: demo\n# caf\xe9\n")
    with pytest.raises(UserError, match=r"recipe.yaml line 2 is not UTF-8 text"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbfbase: demo\n")
    assert read_text(path) == "base: demo\n"


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "nope", "[" * 100_000])
def test_what_is_no_json_object_is_named(content: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / "run.json", content)
    with pytest.raises(UserError, match=r"run.json is not "):
        read_json(tmp_path / "run.json")


def test_hints_are_for_what_is_near() -> None:
    assert did_you_mean("Masking", ["masking", "model"]) == ": did you mean 'masking'?"
    assert did_you_mean("zzz", ["masking"]) == ""
    assert nearest_of("urk", ["url", "caption"]) == ": did you mean 'url'?; known: url, caption"
    assert nearest_of("urk", []) == "; known: none"
