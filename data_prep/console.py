"""What the commands print: progress bars and small tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from tqdm import tqdm

TERMINAL_REFRESH_S = 0.2
LOG_FILE_REFRESH_S = 10.0  # a batch job's log gets a line now and then, not a film


def progress_bar(
    name: str, total: float, unit: str, initial: float = 0, bar_format: str | None = None
) -> tqdm[NoReturn]:
    """A progress bar with the time left, to standard error."""
    return tqdm(
        desc=name,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        bar_format=bar_format,
        mininterval=TERMINAL_REFRESH_S if sys.stderr.isatty() else LOG_FILE_REFRESH_S,
        smoothing=0.1,
        dynamic_ncols=True,
    )


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print left-aligned columns, numbers (cells of digits, commas, points, %) right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        ]
        print("  " + "  ".join(cells).rstrip())


def _is_number(cell: str) -> bool:
    return bool(cell) and all(character in "0123456789,.% " for character in cell)
