"""Lines of a byte range of a large file, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 16 << 20  # a longer line is skipped; captions of megabytes still reach the filter that counts them
OVERLONG = b"(a line too long to read)\n"  # stands for a skipped line; no list has a row of this form


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
