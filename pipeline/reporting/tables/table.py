"""What a table is: columns, rows of three kinds, the best figures marked among ours; and its files.

CSV has all digits, LaTeX (booktabs) is as papers print it.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from formats.files import write_atomically

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


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\to$",
    "–": "--",
    "…": r"\dots{}",
}
# What a spreadsheet would take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_table_files(directory: Path, tables: Iterable[Table]) -> None:
    """NAME.csv and NAME.tex for each table."""
    directory.mkdir(parents=True, exist_ok=True)
    for table in tables:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", table.name)[:100]
        write_atomically(directory / f"{name}.csv", to_csv(table))
        write_atomically(directory / f"{name}.tex", to_latex(table))


def to_csv(table: Table) -> str:
    """A header and a line per row: kind (ours, published, chance), label, note, figures and their spreads."""
    spreads = [any(row.cells[index].spread for row in table.rows) for index in range(len(table.columns))]
    header = ["kind", table.corner or "row", "note"]
    for column, has_spread in zip(table.columns, spreads, strict=True):
        header += [str(column), f"{column} spread"] if has_spread else [str(column)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(_as_text, header))
    for row in table.rows:
        fields = [row.kind, _as_text(row.label), _as_text(row.note)]
        for cell, has_spread in zip(row.cells, spreads, strict=True):
            fields += [_csv_value(cell), cell.spread] if has_spread else [_csv_value(cell)]
        writer.writerow(fields)
    return stream.getvalue()


def _csv_value(cell: Cell) -> str:
    return _as_text(cell.text) if cell.value is None else f"{cell.value:.6g}"


def _as_text(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def to_latex(table: Table) -> str:
    r"""A `tabular` with booktabs' rules: the best bold, the second underlined, published rows set off with a dagger."""
    width = len(table.columns) + 1
    lines = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    if table.headings:
        lines += _latex_headings(table)
    labels = [column.label for column in table.columns] if table.headings else [str(column) for column in table.columns]
    lines.append(_latex_line([table.corner, *labels]))
    repeated = {label for label, count in Counter(row.label for row in table.of_kind("ours")).items() if count > 1}
    for body in table.bodies:
        lines.append(r"\midrule")
        lines += [_latex_row(row, with_note=row.label in repeated) for row in body]
    lines.append(r"\bottomrule")
    notes = [note for note in (*table.notes, table.warning) if note]
    for note in notes:
        dagger = r"$^\dagger$ " if note.startswith("Published") else ""
        lines.append(rf"\multicolumn{{{width}}}{{l}}{{\footnotesize {dagger}{escape_latex(note)}}} \\")
    return "\n".join([*lines, r"\end{tabular}", ""])


def _latex_headings(table: Table) -> list[str]:
    cells, rules, column = [""], [], 2
    for heading, span in table.headings:
        cells.append(rf"\multicolumn{{{span}}}{{c}}{{{escape_latex(heading)}}}" if heading else "")
        if heading:
            rules.append(rf"\cmidrule(lr){{{column}-{column + span - 1}}}")
        column += span
    return [" & ".join(cells) + r" \\", " ".join(rules)]


def _latex_row(row: Row, with_note: bool) -> str:
    label = f"{row.label} ({row.note})" if with_note and row.kind == "ours" else row.label
    marks = {"best": r"\textbf{%s}", "second": r"\underline{%s}", "": "%s"}
    cells = [marks[cell.mark] % escape_latex(cell.text) for cell in row.cells]
    spreads = [rf" {{\footnotesize {escape_latex(cell.spread)}}}" if cell.spread else "" for cell in row.cells]
    first = escape_latex(label) + (r"$^\dagger$" if row.kind == "published" else "")
    return " & ".join([first, *(cell + spread for cell, spread in zip(cells, spreads, strict=True))]) + r" \\"


def _latex_line(texts: Iterable[str]) -> str:
    return " & ".join(map(escape_latex, texts)) + r" \\"


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is, on one line."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
