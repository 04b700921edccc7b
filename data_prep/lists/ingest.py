"""Url lists -> one canonical list: every row has a uid, an http(s) url and a caption, and no key occurs twice.

Lists are read in pieces, by several processes or array jobs, into a work folder beside the output; then duplicates
are found across all pieces and the rows that stay are written. Memory does not grow with the lists.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from data_prep.console import print_table, progress_bar
from data_prep.lists.canonical import Rejects
from data_prep.lists.catalogue import SOURCES
from data_prep.lists.duplicates import DuplicateMask
from data_prep.lists.folders import Folder
from data_prep.lists.ingest_output import Target
from data_prep.lists.ingest_parts import (
    Options,
    Part,
    Slice,
    ingest_piece,
    piece_name,
    read_result,
    result_file,
)
from data_prep.lists.list_files import Piece, find_pieces
from data_prep.parallel import map_in_processes
from formats.errors import UserError

COUNT_TOLERANCE = 0.001


@dataclasses.dataclass
class Tally:
    """Rows read, rows written, and rows dropped by reason."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)


def ingest(
    sources: Sequence[str],
    output: str,
    options: Options | None = None,
    processes: int = 1,
    share: Slice | None = None,
) -> Tally | None:
    """Read url lists and write the rows to keep, in their order; any path that fsspec knows.

    A source may be a file, a folder or a pattern. `output` that ends in `.parquet` is one file, else a folder of
    parts. Columns that a list does not have are null, except the uid, which is then made from url and caption.
    With `share`, only that share of the pieces is read; the call without it finishes. What an earlier call did is
    not done again. Prints a table; returns None when nothing was finished.

    Raises UserError for a source that is missing or refused, has no url or caption column, lacks a column that a
    limit is about, or when no row passes. The output appears under its name only when it is whole.
    """
    start_s = time.perf_counter()
    options = options or Options()
    pieces = find_pieces(sources, options.list_format)
    output = output.rstrip("/")
    target, work = Target(output), Folder(output + ".ingest-work")
    fingerprint = _fingerprint(pieces, options)
    done = target.report_of(fingerprint)
    if done:
        work.remove()  # left when a run was killed at its very end
        print(f"{output}: already done, {done['written']:,} of {done['read']:,} rows")
        return _tally_of(done)
    if share:
        _read_pieces(pieces[share.index :: share.count], options, work, processes)
        missing = sum(not work.exists(result_file(piece, options)) for piece in pieces)
        print(f"slice {share.index}/{share.count} is read, {missing} of {len(pieces)} pieces are missing")
        print("without --slice the same command reads them and finishes" if missing else "now without --slice")
        return None
    try:
        _read_pieces(pieces, options, work, processes)
    except UserError:
        if not any(work.exists(result_file(piece, options)) for piece in pieces):
            work.remove()  # it has nothing that a corrected command could use
        raise
    report, rejects, parts, mask = _sum_up(pieces, options, work)
    if not report["written"]:
        work.remove()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        raise UserError(f"no row of {', '.join(sources)} can be used: {reasons or 'empty'}; wrong --format?")
    report = {"fingerprint": fingerprint, "sources": list(sources), "format": options.list_format.name} | report
    target.write(parts, mask, work, report, rejects, processes)
    work.remove()
    tally = _tally_of(report)
    _print_tally(tally, output, time.perf_counter() - start_s, options.list_format.name)
    return tally


def _sum_up(
    pieces: Sequence[Piece], options: Options, work: Folder
) -> tuple[dict[str, Any], Rejects, list[Part], DuplicateMask]:
    """The counts over all pieces, and which of their rows are duplicates."""
    results = [read_result(work, result_file(piece, options)) for piece in pieces]
    parts = [part for result in results for part in result.parts]
    rejects = Rejects()
    for result in results:
        rejects.counts.update(result.rejected)
        rejects.examples += result.examples
    mask = _find_duplicates(parts, options.unique, work, rejects)
    rows_read = sum(result.read for result in results)
    report = {
        "unique": list(options.unique),
        "filters": json.loads(options.filters.identity())[0],
        "read": rows_read,
        "written": rows_read - rejects.counts.total(),
        "dropped": dict(+rejects.counts),
    }
    return report, rejects, parts, mask


def _tally_of(report: Mapping[str, Any]) -> Tally:
    return Tally(report["read"], report["written"], Counter(report["dropped"]))


def _fingerprint(pieces: Sequence[Piece], options: Options) -> str:
    names = [piece_name(piece, options) for piece in pieces]
    return hashlib.sha256(json.dumps([names, options.unique]).encode()).hexdigest()


def _read_pieces(pieces: Sequence[Piece], options: Options, work: Folder, processes: int) -> None:
    missing = [piece for piece in pieces if not work.exists(result_file(piece, options))]
    read = functools.partial(ingest_piece, options=options, work=work.url)
    with progress_bar("ingest", len(pieces), "piece", initial=len(pieces) - len(missing)) as progress:
        for _ in map_in_processes(read, missing, processes, limit=len(missing)):
            progress.update()


def _find_duplicates(parts: Sequence[Part], unique: Sequence[str], work: Folder, rejects: Rejects) -> DuplicateMask:
    """Mark what is to be left out; where several keys must be unique, one after the other, in the order given."""
    mask = DuplicateMask([part.rows for part in parts])
    for key in unique:
        before = mask.marked()
        mask.mark([part.buckets[key] for part in parts], functools.partial(_open_records, work, parts, key))
        rejects.counts[f"duplicate {key}"] = mask.marked() - before
    return mask


def _open_records(work: Folder, parts: Sequence[Part], key: str, number: int) -> BinaryIO:
    return work.read(f"{parts[number].name}.{key}")


def _print_tally(tally: Tally, output: str, elapsed_s: float, list_format: str) -> None:
    rate = tally.read / elapsed_s
    print(f"{output}: {tally.written:,} of {tally.read:,} rows, {elapsed_s:.1f} s, {rate:,.0f} rows/s")
    if +tally.dropped:
        print_table(("dropped", "rows"), [(why, f"{n:,}") for why, n in (+tally.dropped).most_common()])
    source = SOURCES.get(list_format)
    if source and source.rows_exact and abs(tally.read - source.rows) > COUNT_TOLERANCE * source.rows:
        print(f"note: {source.title} has {source.rows:,} rows: a part, or a download that was cut off?")
