"""Locks on files and folders, that end with their holder, however it ends.

Not every file system has them. What would be spoilt without (`open_shared` and the others of a node's cache) is refused
there; what is only kept from a mistake (`try_lock`) goes on, and says so. A run directory needs none: formats.owners.
"""

from __future__ import annotations

import fcntl
import functools
import os
import sys
import time
from pathlib import Path
from typing import IO

from formats.errors import UserError

_POLL_S = 0.02


class NoLocksError(UserError):
    """The file system has no locks, or does not offer them here."""


def try_lock(file: IO[bytes] | int, path: Path, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False if somebody holds it.

    Where there are no locks, that is said once, and it counts as locked.
    """
    try:
        _flock(file, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except BlockingIOError:
        return False
    except NoLocksError as error:
        _warn(str(error))
    return True


def holder_of(file: IO[bytes] | int) -> str:
    """Who holds a lock on an open file or folder, in words, as far as this machine knows."""
    inode = str(os.fstat(file if isinstance(file, int) else file.fileno()).st_ino)
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, where, *_ = line.split()
            if (kind, where.rpartition(":")[2]) == ("FLOCK", inode) and int(pid) > 0:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                return f"process {pid} ({' '.join(words).strip()[:80]})"
    except (OSError, ValueError):  # there is no /proc, or the process has just ended
        pass
    return "a process that this machine cannot see, perhaps on another one"


def open_shared(path: Path) -> IO[bytes] | None:
    """A file to read, under a shared lock until it is closed; None if there is no such file."""
    while True:
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        _flock(file, path, fcntl.LOCK_SH, wait=True)
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
            _flock(file, path, fcntl.LOCK_EX)
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
            _flock(file, path, fcntl.LOCK_EX)
        except BlockingIOError:
            return False
        if not _is_still(path, file):
            return False  # another one by now
        path.unlink()
    return True


def _flock(file: IO[bytes] | int, path: Path, kind: int, wait: bool = False) -> None:
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        folder = path if path.is_dir() else path.parent
        raise NoLocksError(
            f"{folder} is on a file system without locks ({error.strerror}): two commands at once can spoil what is "
            "there; a disk of this machine has them"
        ) from error


@functools.cache
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Whether the path leads to the open file: while waiting for the lock it may have been renamed or removed."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
