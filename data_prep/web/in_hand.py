"""Which picture a worker was decoding when something killed it: a decoder may be driven into a crash, or out of memory.

A file beside a shard in the making holds, in lines of one length, the picture that is being decoded now and those that
were when earlier workers ended. What was there FATAL times is not decoded again: it costs itself and not its shard.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

SUFFIX = ".decoding"
FATAL = 2  # once it may have been somebody who ended the download
_WIDTH = 12
_NOTHING = " " * (_WIDTH - 1) + "\n"


class InHand:
    """The pictures of one shard, by their row in it; from several threads, one at a time."""

    def __init__(self, file: Path) -> None:
        words = file.read_text(encoding="ascii", errors="replace").split() if file.exists() else []
        left = [word for word in words if word.isdecimal()]
        self._deaths = Counter(map(int, left))
        file.parent.mkdir(exist_ok=True)
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(self._file, "".join([_NOTHING, *map(_line, left)]).encode())

    def __enter__(self) -> InHand:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def is_fatal(self, row: int) -> bool:
        """Whether this picture has ended its decoder before."""
        return self._deaths[row] >= FATAL

    @contextlib.contextmanager
    def holding(self, row: int) -> Iterator[None]:
        """While a picture is decoded. The system keeps what is written, whatever ends this process."""
        os.pwrite(self._file, _line(row).encode(), 0)
        try:
            yield
        finally:
            os.pwrite(self._file, _NOTHING.encode(), 0)


def _line(row: object) -> str:
    return f"{row:>{_WIDTH - 1}}\n"
