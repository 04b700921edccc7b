"""Errors that are the user's to mend, each said in one line: what is wrong, where, what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Collection


class UserError(Exception):
    """What is wrong, where, and what to do, in one line; shown without a traceback, exit code 2."""

    exit_code = 2


_NO_ROOM = "cannot be written: no space left on the device; make room and run it again"
_BROKEN = "cannot be read or written: the disk or its server fails; run it again when that is mended"
_NO_PERMISSION = "no permission to read or write it: change that, or name another path"
_NEEDS_A_FOLDER = "is a file where a folder is needed: name another path"
# of what the system says, what users meet; for the rest its own words are shown
_ADVICE = {
    errno.ENOENT: "does not exist: check the path",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EEXIST: _NEEDS_A_FOLDER,  # what mkdir says of one
    errno.ENOTDIR: "a part of this path is a file, not a folder: check the path",
    errno.EISDIR: "is a folder where a file is needed: name another path",
    errno.ELOOP: "its symbolic links lead in a circle: mend them, or name another path",
    errno.ENAMETOOLONG: "is longer than the file system allows: choose a shorter name",
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: "cannot be written: your quota is used up; make room and run it again",
    errno.EFBIG: "cannot be written: larger than files may be here; name a path elsewhere",
    errno.EROFS: "cannot be written: the file system is read-only; name a path elsewhere",
    errno.EMFILE: "cannot be opened: too many files are open; raise the limit (ulimit -n) and run it again",
    errno.ENFILE: "cannot be opened: too many files are open on this machine; run it again later",
    errno.EIO: _BROKEN,
    errno.ESTALE: _BROKEN,
}
# what is nobody's mistake in the program even where the system names no file
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_OF_THE_MACHINE = _NO_PLACE | {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}


def describe_os_error(error: OSError) -> str | None:
    """An error of the system as a line for its user; None for one that names nothing of theirs: a defect."""
    filename = error.filename2 or error.filename  # of a rename, what the user knows is where it was to end
    if isinstance(filename, str | bytes):
        name = filename if isinstance(filename, str) else repr(filename)
        return f"{name}: {_ADVICE.get(error.errno or 0, error.strerror)}"
    if error.errno in _OF_THE_MACHINE:
        return f"a file {_ADVICE[error.errno]}"
    if (error.errno is None and str(error)) or isinstance(error, ConnectionError | TimeoutError):
        return (
            " ".join(str(error).split()) or type(error).__name__
        )  # of remote storage, whose libraries have no numbers
    return None


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f": did you mean {by_lower[near[0]]!r}?" if near else ""


def nearest_of(name: str, known: Collection[str]) -> str:
    """The same, followed by all that are known."""
    return f"{did_you_mean(name, known)}; known: {', '.join(known) or 'none'}"
