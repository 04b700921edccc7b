"""What the commands print: progress bars and small tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from tqdm import tqdm

TERMINAL_REFRESH_S = 0.2
LOG_FILE_REFRESH_S = 10.0  # a batch job's log gets a line now and then, not a film


def progress_bar(
    name: str, total: float | None, unit: str, initial: float = 0, bar_format: str | None = None
) -> tqdm[NoReturn]:
    """A progress bar, with the time left where the total is known, to standard error."""
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


def print_counts(title: str, unit: str, counts: Mapping[str, int]) -> None:
    """Print how many `unit` there are for each reason, the most frequent first; nothing where there are none."""
    rows = sorted(((why, count) for why, count in counts.items() if count), key=lambda row: -row[1])
    if rows:
        print_table((title, unit), [(why, f"{count:,}") for why, count in rows])


def _is_number(cell: str) -> bool:
    return bool(cell) and all(character in "0123456789,.% " for character in cell)
