"""Files that processes of a node share: locks that end with their holder, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

_POLL_S = 0.02


def open_shared(path: Path) -> IO[bytes] | None:
    """A file to read, under a shared lock until it is closed; None if there is no such file."""
    while True:
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_still(path, file):
            return file
        file.close()


def open_exclusive(path: Path, wait: bool = True) -> IO[bytes] | None:
    """A file to write, made if absent, its content kept, under an exclusive lock until it is closed.

    None if somebody holds a lock on it and this one is not to wait.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, file):
                return file
            file.close()
        except BlockingIOError:
            file.close()
            if not wait:
                return None
            # not in flock: once the file is renamed, readers may keep it locked for hours
            time.sleep(_POLL_S)


def remove_unless_locked(path: Path) -> bool:
    """Remove a file that nobody holds a lock on; whether it is gone."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _is_still(path, file):
            return False  # another one by now
        path.unlink()
    return True


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Whether the path leads to the open file: while waiting for the lock it may have been renamed or removed."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
