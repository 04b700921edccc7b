"""The second half of ingest: the rows to keep, from the work folder to one parquet file or a folder of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.console import progress_bar
from data_prep.lists.canonical import SCHEMA, Rejects
from data_prep.lists.duplicates import DuplicateMask, Mask
from data_prep.lists.folders import Folder, parent_and_name
from data_prep.lists.ingest_parts import Part, read_part
from data_prep.parallel import map_in_processes
from formats.errors import UserError

ROWS_PER_GROUP = 100_000
REPORT, REJECTS = "ingest.json", "rejects.jsonl"
_OWN_FILE = re.compile(r"part-\d+\.parquet|ingest\.json|rejects\.jsonl")


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
            stream.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rejects.examples)
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
