"""What a table is, whatever it is written as: columns, rows of three kinds, the best figures marked among ours."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

Item = TypeVar("Item", bound=Hashable)

Kind = Literal["ours", "published", "chance"]


@dataclass(frozen=True)
class Cell:
    """One entry as text. `value`: what it sorts by; `spread`: ± or an interval, small beside it; `mark`: its place."""

    text: str
    value: float | None = None
    spread: str = ""
    mark: Literal["", "best", "second"] = ""

    def __str__(self) -> str:
        return f"{self.text} {self.spread}".rstrip()


@dataclass(frozen=True)
class Row:
    """A labelled row; `note` stands small beside the label."""

    label: str
    cells: tuple[Cell, ...]
    note: str = ""
    kind: Kind = "ours"


@dataclass(frozen=True)
class Column:
    """A column; neighbours with the same heading share it."""

    label: str
    heading: str = ""

    def __str__(self) -> str:
        return f"{self.heading} {self.label}".lstrip()


@dataclass(frozen=True)
class Table:
    """A table. name: of its files; notes: below it; warning: why its rows may not be compared."""

    name: str
    title: str
    subtitle: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    corner: str = "checkpoint"
    notes: tuple[str, ...] = ()
    warning: str = ""

    def of_kind(self, kind: Kind) -> list[Row]:
        """Its rows of one kind, in order."""
        return [row for row in self.rows if row.kind == kind]

    @property
    def bodies(self) -> list[list[Row]]:
        """Rows by kind, without the kinds that it has none of: what is published is never sorted in among ours."""
        kinds: tuple[Kind, ...] = ("ours", "published", "chance")
        return [rows for kind in kinds if (rows := self.of_kind(kind))]

    @property
    def headings(self) -> list[tuple[str, int]]:
        """Each heading and the number of columns under it; empty if no column has one."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and column.heading and spans[-1][0] == column.heading:
                spans[-1] = (column.heading, spans[-1][1] + 1)
            else:
                spans.append((column.heading, 1))
        return spans if any(heading for heading, _ in spans) else []


def percent(share: float | None, spread: str = "") -> Cell:
    """A share in [0, 1] as a cell in percent, an empty one for None."""
    return Cell("") if share is None else Cell(f"{100 * share:.2f}", 100 * share, spread)


def mark_places(rows: Sequence[Row], columns: int) -> list[Row]:
    """The best and the second figure of the first `columns` columns marked, of several rows that are ours only."""
    marks: dict[tuple[int, int], Literal["best", "second"]] = {}
    ours = [index for index, row in enumerate(rows) if row.kind == "ours"]
    for column in range(columns if len(ours) > 1 else 0):
        values = {index: value for index in ours if (value := rows[index].cells[column].value) is not None}
        ranked = sorted(set(values.values()), reverse=True)
        for index, value in values.items():
            if value in ranked[:2]:
                marks[index, column] = "best" if value == ranked[0] else "second"
    return [
        replace(row, cells=tuple(replace(cell, mark=marks.get((index, i), "")) for i, cell in enumerate(row.cells)))
        for index, row in enumerate(rows)
    ]


def distinct(items: Iterable[Item]) -> list[Item]:
    """Each item once, in the order of its first."""
    return list(dict.fromkeys(items))
