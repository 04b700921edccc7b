"""What a run writes beside its checkpoints, line by line: a disk that is full costs a warning, never the run."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


class Unwritable:
    """Says of one file or folder that it cannot be written: the first time only, in one line on stderr."""

    def __init__(self, path: Path, consequence: str) -> None:
        """consequence: what becomes of what is not written."""
        self._path = path
        self._consequence = consequence
        self._is_said = False

    def say(self, error: OSError) -> None:
        """Why it could not be written now."""
        if not self._is_said:
            reason = error.strerror or str(error)
            text = f"warning: {self._path} cannot be written: {reason}; training goes on, {self._consequence}"
            print(text, file=sys.stderr, flush=True)
        self._is_said = True


class LineFile:
    """A text file that grows by whole lines; this process alone writes it.

    What cannot be written waits, in order, until there is room. A part of a line, left by a write that failed or by a
    process that was killed, is cut off: at once where that is possible, otherwise before the next line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._end_bytes: int | None = None  # of what is whole, after a write that failed
        self._unwritable = Unwritable(path, "these lines are written when it can be")

    def append(self, *lines: str) -> bool:
        """Write lines, given without their ends, after all that wait; none: those alone. Whether nothing waits now."""
        self._waiting += [line.encode(errors="backslashreplace") + b"\n" for line in lines]
        if self._waiting:
            try:
                self._write()
            except OSError as error:
                self._cut()
                self._unwritable.say(error)
        return not self._waiting

    def _write(self) -> None:
        with self.path.open("a+b", buffering=0) as file:
            size_bytes = file.seek(0, os.SEEK_END)
            end_bytes = _end_of_lines(file.fileno(), size_bytes) if self._end_bytes is None else self._end_bytes
            if size_bytes > end_bytes:
                file.truncate(end_bytes)
            self._end_bytes = min(size_bytes, end_bytes)
            rest = memoryview(b"".join(self._waiting))
            while rest:  # a disk that fills up takes a part, and refuses the next
                rest = rest[file.write(rest) :]
        # closed: a network file system may say only then that there is no room
        self._waiting, self._end_bytes = [], None

    def _cut(self) -> None:
        if self._end_bytes is not None:
            with contextlib.suppress(OSError):
                if self.path.stat().st_size > self._end_bytes:
                    os.truncate(self.path, self._end_bytes)


def _end_of_lines(descriptor: int, size_bytes: int) -> int:
    """How much of a file is whole lines."""
    if not size_bytes or os.pread(descriptor, 1, size_bytes - 1) == b"\n":
        return size_bytes
    return os.pread(descriptor, size_bytes, 0).rfind(b"\n") + 1
