"""Tables as files for other programs: CSV with all digits, LaTeX (booktabs) as papers print them."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from formats.files import write_atomically
from pipeline.reporting.table import Cell, Row, Table

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
