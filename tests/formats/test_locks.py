"""File systems without locks: what would be spoilt is refused, what is only kept from mistakes goes on with a word."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from formats import locks
from formats.locks import NoLocksError, holder_of, open_exclusive, open_shared, remove_unless_locked, try_lock


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks._warn.cache_clear()


@pytest.mark.parametrize("work", [open_shared, open_exclusive, remove_unless_locked])
def test_a_cache_is_refused(work: Callable[[Path], object], no_locks: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoLocksError, match=f"{tmp_path} is on a file system without locks"):
        work(tmp_path / "file")


def test_a_guard_against_mistakes_goes_on_and_says_so_once(
    no_locks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with (tmp_path / "log").open("wb") as file:
            assert try_lock(file, tmp_path / "log")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path} is on a file system without locks")


def test_of_two_one_gets_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as first, (tmp_path / "log").open("wb") as second:
        assert try_lock(first, tmp_path)
        assert not try_lock(second, tmp_path)
        assert not try_lock(second, tmp_path, shared=True)
    with (tmp_path / "log").open("wb") as first, (tmp_path / "log").open("wb") as second:
        assert try_lock(first, tmp_path, shared=True)
        assert try_lock(second, tmp_path, shared=True)


def test_whoever_holds_it_is_named(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as first, (tmp_path / "log").open("wb") as second:
        assert try_lock(first, tmp_path)
        assert not try_lock(second, tmp_path)
        assert f"process {os.getpid()} (" in holder_of(second)
    with (tmp_path / "log").open("wb") as nobody:
        assert "cannot see" in holder_of(nobody)
