"""Url lists -> one canonical list: every row has a uid, an http(s) url and a caption, and no key occurs twice.

Lists are read in pieces, by several processes or array jobs, into a work folder beside the output; then duplicates
are found across all pieces and the rows that stay are written. Memory does not grow with the lists.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.console import print_counts, progress_bar
from data_prep.folders import Folder, parent_and_name
from data_prep.lists.catalogue import SOURCES
from data_prep.lists.exact_duplicates import DuplicateMask, Mask
from data_prep.lists.list_files import Piece, find_pieces
from data_prep.lists.rows import (
    SCHEMA,
    Options,
    Part,
    Rejects,
    check_columns,
    ingest_piece,
    piece_name,
    read_part,
    read_result,
    result_file,
)
from data_prep.parallel import map_in_processes
from formats.errors import UserError
from formats.files import to_json

COUNT_TOLERANCE = 0.001
ROWS_PER_GROUP = 100_000
REPORT, REJECTS = "ingest.json", "rejects.jsonl"
_OWN_FILE = re.compile(r"part-\d+\.parquet|ingest\.json|rejects\.jsonl")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Share `index` of `count` of the work, for array jobs; index from 0."""

    index: int = 0
    count: int = 1


@dataclasses.dataclass
class Tally:
    """Rows read, rows written, and rows dropped by reason."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    emptied: Counter[str] = dataclasses.field(default_factory=Counter)  # values of other rows that could not be used


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
    for piece in [piece for index, piece in enumerate(pieces) if not index or piece.path != pieces[index - 1].path]:
        check_columns(piece, options.filters)  # of each list
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
        rejects.emptied.update(result.emptied)
        rejects.examples += result.examples
    mask = _find_duplicates(parts, options.unique, work, rejects)
    rows_read = sum(result.read for result in results)
    report = {
        "unique": list(options.unique),
        "filters": json.loads(options.filters.identity())[0],
        "read": rows_read,
        "written": rows_read - rejects.counts.total(),
        "dropped": dict(+rejects.counts),
        "emptied": dict(+rejects.emptied),
    }
    return report, rejects, parts, mask


def _tally_of(report: Mapping[str, Any]) -> Tally:
    return Tally(report["read"], report["written"], Counter(report["dropped"]), Counter(report.get("emptied", {})))


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
    print_counts("dropped", "rows", tally.dropped)
    print_counts("left empty", "rows", tally.emptied)
    source = SOURCES.get(list_format)
    if source and source.rows_exact and abs(tally.read - source.rows) > COUNT_TOLERANCE * source.rows:
        print(f"note: {source.title} has {source.rows:,} rows: a part, or a download that was cut off?")


@dataclasses.dataclass(frozen=True)
class _File:
    """A parquet file to write: the rows of `parts` that their masks do not mark."""

    name: str
    parts: Sequence[Part]
    masks: Sequence[Mask]


class Target:
    """The finished list: one parquet file, or a folder of them, with a report and a sample of refused rows."""

    def __init__(self, output: str) -> None:
        """Raises UserError for a folder that holds anything else: what is in it will be replaced."""
        self._is_file = output.endswith(".parquet")
        if self._is_file:
            self._folder, self._name = parent_and_name(output)
            self._prefix = self._name.removesuffix("parquet")  # urls.parquet -> urls.ingest.json
        else:
            self._folder, self._prefix = Folder(output), ""
            if self._folder.is_file():
                raise UserError(f"{output} is a file: choose a name that ends in .parquet, or a folder")
            others = [name for name in self._folder.names() if not _OWN_FILE.fullmatch(name)]
            if others:
                raise UserError(f"{output} holds other things ({others[0]}): choose another --output")

    def report_of(self, fingerprint: str) -> dict[str, Any] | None:
        """The report of the output, if it was made of the same lists with the same options."""
        there = self._folder.exists(self._name) if self._is_file else True
        if not there or not self._folder.exists(self._prefix + REPORT):
            return None
        try:
            report = self._folder.read_json(self._prefix + REPORT)
        except ValueError:  # damaged: made again
            return None
        return report if report.get("fingerprint") == fingerprint else None

    def write(
        self, parts: Sequence[Part], mask: DuplicateMask, work: Folder, report: Mapping[str, Any], rejects: Rejects,
        processes: int,
    ) -> None:  # fmt: skip
        """Write the rows of all parts that the mask does not mark."""
        if self._is_file:
            folder = self._folder
            folder.delete(self._prefix + REPORT)  # no longer true once the file is replaced
            file = _File(self._name, parts, [mask.part(number) for number in range(len(parts))])
            with progress_bar("write", len(parts), "part") as progress:
                _write_parquet(folder.url, work.url, file, overwrite=True, on_part=progress.update)
        else:
            folder = Folder(f"{work.url}/output-{report['fingerprint'][:16]}")
            kept = [number for number in range(len(parts)) if not mask.part(number).all()]
            tasks = (_File(f"part-{index:05d}.parquet", [parts[i]], [mask.part(i)]) for index, i in enumerate(kept))
            write = functools.partial(_write_parquet, folder.url, work.url, overwrite=False)
            with progress_bar("write", len(kept), "part") as progress:
                for _ in map_in_processes(write, tasks, processes, limit=len(kept)):
                    progress.update()
        with folder.writing(self._prefix + REJECTS) as stream:
            stream.writelines((to_json(row) + "\n").encode() for row in rejects.examples)
        folder.write_json(self._prefix + REPORT, report)
        if not self._is_file:
            folder.move_to(self._folder)


def _write_parquet(
    folder_url: str, work_url: str, file: _File, overwrite: bool, on_part: Callable[[], object] | None = None
) -> None:
    """Write a file, unless it is there; `on_part` is called after each of its parts."""
    folder, work = Folder(folder_url), Folder(work_url)
    if folder.exists(file.name) and not overwrite:
        return

    def tables() -> Iterator[pa.Table]:
        for part, duplicate in zip(file.parts, file.masks, strict=True):
            start = 0
            for table in read_part(work, part):
                yield table.filter(pa.array(~duplicate[start : start + table.num_rows]))
                start += table.num_rows
            if on_part:
                on_part()

    # dictionaries cost time and save nothing: nearly every text is different
    with (
        folder.writing(file.name) as stream,
        pq.ParquetWriter(stream, SCHEMA, compression="zstd", use_dictionary=["language"]) as writer,
    ):
        for row_group in _regroup(tables()):
            writer.write_table(row_group)


def _regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables into row groups of at least `ROWS_PER_GROUP` rows."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(part.num_rows for part in pending) >= ROWS_PER_GROUP:
            yield pa.concat_tables(pending)
            pending = []
    if pending:
        yield pa.concat_tables(pending)
