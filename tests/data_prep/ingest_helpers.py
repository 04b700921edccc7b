"""What the tests of `data-prep ingest` share."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.lists.ingest import Tally
from data_prep.lists.list_files import ColumnChoice, ListFormat
from data_prep.lists.rows import SCHEMA, Options

KEEP_ALL = Options(unique=())


def of_format(name: str, **columns: str) -> Options:
    return Options(ListFormat(name, ColumnChoice(**columns)), unique=())


def read(output: Path) -> pa.Table:
    """A parquet file, or the parts of a folder in their order."""
    files = sorted(output.glob("part-*.parquet")) if output.is_dir() else [output]
    return pa.concat_tables(pq.read_table(file) for file in files)


def rows_of(output: Path) -> list[tuple[str, str]]:
    table = read(output)
    assert table.schema.equals(SCHEMA)
    return list(zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True))


def done(tally: Tally | None) -> Tally:
    assert tally is not None
    return tally
