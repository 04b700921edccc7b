"""Lines of a byte range of a large file, and records of a CSV, in bounded memory."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 16 << 20  # a longer line is skipped; captions of megabytes still reach the filter that counts them
MAX_RECORD_BYTES = 1 << 20  # of a CSV row over several lines: a quote that is still open then was never closed
OVERLONG = b"(a line too long to read)\n"  # stands for a skipped line; no list has a row of this form
EXAMPLE_CHARS = 300
MALFORMED = "malformed line"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Range:
    """A piece of one table: bytes of a text file (lines that begin in it), or row groups of a parquet file."""

    start: int = 0
    stop: int | None = None  # None: to the end


@dataclasses.dataclass(frozen=True)
class Refused:
    """A row that cannot be read: why, and how it begins."""

    reason: str
    text: str


def malformed(line: bytes) -> Refused:
    """A line that does not fit."""
    return Refused(MALFORMED, line[:EXAMPLE_CHARS].decode("utf-8", "replace").rstrip("\r\n"))


def blocks_of_lines(
    stream: BinaryIO, start: int = 0, stop: int | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[bytes, int]]:
    """Blocks of whole lines: exactly the lines that begin in [start, stop), whatever the range cuts.

    Yields (lines, overlong): `overlong` counts lines skipped because they exceed `MAX_LINE_BYTES`. A range that does
    not begin at 0 needs a stream that can seek.
    """
    position = start  # of the next line to yield
    skipping = False  # inside a line that is not ours, or too long
    if start:
        stream.seek(start - 1)  # if a line feed stands there, a line begins at `start`
        position, skipping = start - 1, True
    rest = b""
    while stop is None or position < stop:
        block = stream.read(block_bytes)
        data = rest + block
        if skipping:
            end_of_line = data.find(b"\n") + 1
            position += end_of_line or len(data)
            data, skipping = data[end_of_line:] if end_of_line else b"", not end_of_line
        ends_here = not block
        if stop is not None and position < stop <= position + len(data):
            last = data.find(b"\n", stop - position - 1)
            data, ends_here = (data[: last + 1], True) if last >= 0 else (data, ends_here)
        elif stop is not None and position >= stop:
            return
        cut = len(data) if ends_here else data.rfind(b"\n") + 1
        if data[:cut]:
            yield data[:cut], 0
        if ends_here:
            return
        position += cut
        rest = data[cut:]
        if len(rest) > MAX_LINE_BYTES:
            yield b"", 1
            position += len(rest)
            rest, skipping = b"", True


def lines(stream: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The same lines one by one, with their line ends; `OVERLONG` in the place of one that is too long."""
    for block, overlong in blocks_of_lines(stream, start, stop):
        yield from [OVERLONG] * overlong
        yield from block.splitlines(keepends=True) if b"\r" not in block else _split(block)


def _split(block: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(block):
        end = block.find(b"\n", start) + 1 or len(block)
        yield block[start:end]
        start = end


class CsvRecords:
    """Records of a CSV as RFC 4180 has them: (bytes in the file, fields), one after the other.

    Where a record does not fit, because it has not `width` fields, text follows a closing quote, or a quote is never
    closed, its first line is given with None, and reading goes on at the line after it. Empty lines are no records.
    """

    _QUOTED = re.compile(rb'([^"]*+(?:""[^"]*+)*+)"')  # what follows an opening quote, with the closing one

    def __init__(self, lines_: Iterator[bytes], width: int | None = None) -> None:
        self._lines = lines_
        self._width = width
        self._taken: list[bytes] = []  # the lines of the record that is being read
        self._ahead: deque[bytes] = deque()  # those that were looked at in vain for the end of a quoted field

    def __iter__(self) -> Iterator[tuple[bytes, list[bytes] | None]]:
        while self._next_record():
            line = self._taken[0]
            fields = self._quoted_fields() if b'"' in line else line.rstrip(b"\r\n").split(b",")
            if fields is not None and len(fields) == (self._width or len(fields)):
                yield b"".join(self._taken), fields
            else:
                self._ahead.extendleft(reversed(self._taken[1:]))
                yield line, None

    def _next_record(self) -> bool:
        self._taken = []
        while line := self._next_line():
            if line.strip(b"\r\n"):
                return True
            self._taken = []
        return False

    def _next_line(self) -> bytes:
        line = self._ahead.popleft() if self._ahead else next(self._lines, b"")
        if line:
            self._taken.append(line)
        return line

    def _quoted_fields(self) -> list[bytes] | None:
        line, at = self._taken[0], 0
        size_bytes = len(line)
        fields: list[bytes] = []
        while True:
            if line.startswith(b'"', at):
                pieces = []
                at += 1
                while (match := self._QUOTED.match(line, at)) is None:
                    pieces.append(line[at:])
                    line, at = self._next_line(), 0
                    size_bytes += len(line)
                    if not line or line == OVERLONG or size_bytes > MAX_RECORD_BYTES:
                        return None
                fields.append(b"".join([*pieces, match[1]]).replace(b'""', b'"'))
                at = match.end()
            else:
                stop = len(line.rstrip(b"\r\n"))
                comma = line.find(b",", at, stop)
                fields.append(line[at : stop if comma < 0 else comma])
                at = stop if comma < 0 else comma
            if not line.startswith(b",", at):
                return None if line[at:].strip(b"\r\n") else fields
            if len(fields) == self._width:
                return None
            at += 1
