"""Download the images of a canonical parquet into shards, and try again what failed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.boxes import BoxError, read_boxes
from data_prep.web.ledger import (
    COLUMNS,
    LISTED_HASH,
    OK,
    RETRIABLE,
    count_outcomes,
    last_outcomes,
    print_outcomes,
)
from data_prep.web.passes import FIXED, Pass, Settings, list_files, read_passes, statistics_path
from data_prep.web.processes import check_distributor, fill_missing_shards, working_in
from formats.errors import UserError, nearest_of
from formats.files import read_json_lines, replacing, sha256_of, write_json_lines
from formats.manifest import DATASET, MANIFEST, PROVENANCE

__all__ = ["Settings", "download", "retry"]

INGEST = "bring it into form with `data-prep ingest`"


def download(urls: Path, directory: Path, settings: Settings, share: tuple[int, int] | None = None) -> Counter[str]:
    """Fetch every url of a canonical parquet, or of a folder of its parts (see `ingest`), into shards in `directory`.

    Images larger than `image_size` pixels are scaled down, none is scaled up. Shards that are already there are
    kept, so the same command continues an interrupted run. With `share` (index, count) every count-th shard is
    filled, for array jobs. Prints the outcomes by class and returns them.

    Raises UserError when the list cannot be used, the directory holds another download, shards cannot be written,
    or not a single image could be had.
    """
    check_distributor(settings.distributor)
    rows = _claim(directory, urls, settings)
    first = dataclasses.replace(read_passes(directory)[0], urls=urls, share=share or (0, 1))
    with working_in(directory, first.share) as log:
        _fill(directory, first, settings, log)
    counts = count_outcomes(directory)
    print_outcomes(counts)
    if not counts[OK] and not share:
        raise UserError(
            f"none of {rows:,} urls gave an image (outcomes above): check the network and the url list, "
            f"then delete {directory} and run again"
        )
    return counts


def retry(directory: Path, classes: Sequence[str], settings: Settings) -> Counter[str]:
    """Fetch again what ended in one of `classes`, into further shards; prints and returns the outcomes of all urls.

    A retry that was interrupted is finished first, whatever its classes. What decides the shards' content comes from
    the download.

    Raises UserError for an unknown class, a directory without a finished download, or shards that cannot be written.
    """
    check_distributor(settings.distributor)
    for name in classes:
        if name not in RETRIABLE:
            raise UserError(f"--class {name}: no such class{nearest_of(name, RETRIABLE)}")
    if not read_passes(directory):
        raise UserError(f"{directory}: no download was made here; start with `data-prep download`")
    settings = _as_before(directory, settings)
    with working_in(directory) as log:
        last = read_passes(directory)[-1]
        if not last.missing(directory):
            chosen = _choose(directory, classes, settings)
            if chosen is not None:
                _fill(directory, chosen, settings, log)
        elif last.classes:
            print(f"finishing the retry of {', '.join(last.classes)} that was interrupted")
            _fill(directory, last, settings, log)
        else:
            raise UserError(f"{directory}: the download is not finished; run it again first")
    counts = count_outcomes(directory)
    print_outcomes(counts)
    return counts


def _choose(directory: Path, classes: Sequence[str], settings: Settings) -> Pass | None:
    """Write the list of what to try again and note it as a pass of its own."""
    name = f"retry_{len(read_passes(directory)) + 1}.parquet"
    if not any(pc.any(pc.not_equal(table["url"], "")).as_py() for table in _failed(directory, classes)):
        print(f"no url ended in {', '.join(classes)}: nothing to do")
        return None
    tables = _failed(directory, classes)
    first = next(tables)
    rows = 0
    with replacing(directory / name) as temporary, pq.ParquetWriter(temporary, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
            rows += table.num_rows
    line = {
        "step": "retry",
        "classes": list(classes),
        "urls": name,
        "rows": rows,
        "samples_per_shard": settings.samples_per_shard,
    }
    write_json_lines(directory / PROVENANCE, [*read_json_lines(directory / PROVENANCE), line])
    return read_passes(directory)[-1]


def _failed(directory: Path, classes: Sequence[str]) -> Iterator[pa.Table]:
    """The urls to try again, as a list that `download` could read.

    Rows that `forget` blanked come along, so that every row of a class goes over to the new pass; nobody asks for them.
    """
    for table in last_outcomes(directory):
        chosen = table.filter(pc.is_in(table["class"], pa.array(list(classes))))
        listed_hash = chosen[LISTED_HASH]
        chosen = chosen.drop_columns([name for name in COLUMNS.names if name in chosen.column_names])
        if chosen.num_rows:
            yield chosen.append_column("sha256", listed_hash)


def _fill(directory: Path, one: Pass, settings: Settings, log: BinaryIO) -> None:
    missing = one.missing(directory)
    for shard in missing:
        statistics_path(directory, shard).unlink(missing_ok=True)  # cut off in the writing
    if missing:
        # what these say about the directory ends here; verify writes them anew
        (directory / DATASET).unlink(missing_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)
        fill_missing_shards(directory, one, settings, log)


def check_list(urls: Path, settings: Settings) -> None:
    """Refuse, before the first request, a list with anything that would keep a shard from being written."""
    files = [path for path in list_files(urls) if path.is_file()]
    rows = rows_with_boxes = 0
    first: dict[str, pa.DataType] = {}
    for path in files:
        try:
            file = pq.ParquetFile(path)
            columns = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            _check_columns(path, file.schema_arrow, settings.blur_column)
            first = first or columns
            other = next((name for name in {**first, **columns} if first.get(name) != columns.get(name)), None)
            if other is not None:
                types = f"{columns.get(other, 'absent')}, and {first.get(other, 'absent')} in {files[0].name}"
                raise UserError(f"{path}: its column {other} is {types}: {INGEST}")
            for batch in file.iter_batches():
                rows_with_boxes += _check_rows(path, batch, settings.blur_column)
                rows += len(batch)
        except pa.ArrowException as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}: {INGEST}") from error
    if settings.blur_column and not rows_with_boxes:
        raise UserError(
            f"{urls}: all of --blur-column {settings.blur_column} is null, so that nothing would be blurred: "
            "name the column with the boxes (an empty list says that a picture has none)"
        )
    if settings.blur_column and rows_with_boxes < rows:
        unsaid = rows - rows_with_boxes
        print(f"{unsaid:,} of {rows:,} rows have null in {settings.blur_column}: nothing is blurred in their pictures")


def _check_columns(path: Path, schema: pa.Schema, blur_column: str | None) -> None:
    needed = ["uid", "url", "caption", *([blur_column] if blur_column else [])]
    absent = [name for name in needed if name not in schema.names]
    if absent:
        raise UserError(f"{path} has no column {', '.join(absent)}: {INGEST}")
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]}: {INGEST}")
    for name in {"url", "caption", "sha256"}.intersection(schema.names):
        kind = schema.field(name).type
        value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_absent = name == "sha256" and pa.types.is_null(kind)
        if value_type not in (pa.string(), pa.large_string(), pa.string_view()) and not is_absent:
            raise UserError(f"{path}: its column {name} is {kind}, not text: {INGEST}")


def _check_rows(path: Path, batch: pa.RecordBatch, blur_column: str | None) -> int:
    """How many rows say which boxes to blur."""
    batch.validate(full=True)  # text that is not UTF-8, above all
    passes = pc.match_substring_regex(batch["url"].cast(pa.string()), r"^(?i:https?)://").fill_null(False)
    if not pc.all(passes, min_count=0).as_py():
        raise UserError(f"{path} has urls that are not http(s): filter them with `data-prep ingest`")
    for name in ("uid", "caption"):
        if batch[name].null_count:
            raise UserError(f"{path} has rows without {name}: {INGEST}")
    if blur_column is None:
        return 0
    try:
        for value in batch[blur_column].to_pylist():
            read_boxes(value)
    except BoxError as error:
        raise UserError(f"{path}: --blur-column {blur_column}: {error}") from error
    return len(batch) - int(batch[blur_column].null_count)


def _count_rows(urls: Path) -> int:
    files = [path for path in list_files(urls) if path.is_file()]
    if not files:
        raise UserError(f"{urls}: no such file, or folder of parts; make it with `data-prep ingest`")
    try:
        rows = sum(int(pq.read_metadata(path).num_rows) for path in files)
    except pa.ArrowException as error:
        raise UserError(f"{urls}: {str(error).splitlines()[0]}: {INGEST}") from error
    if not rows:
        raise UserError(f"{urls} has no rows")
    return rows


def _digest(urls: Path) -> str:
    """The sha256 of a file; of a folder, that of its parts' names and hashes."""
    if urls.is_file():
        return sha256_of(urls)
    lines = [f"{path.name} {sha256_of(path)}\n" for path in list_files(urls)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _claim(directory: Path, urls: Path, settings: Settings) -> int:
    """Note what is downloaded where, and how many rows it has; refuse a directory that holds something else."""
    rows = _count_rows(urls)
    line = {
        "step": "download",
        "urls": urls.name,
        "urls_sha256": _digest(urls),
        "rows": rows,
        **{name: getattr(settings, name) for name in FIXED},
    }
    provenance = directory / PROVENANCE
    before = read_json_lines(provenance)
    if before:
        changed = [name for name in line if before[0].get(name) != line[name]]
        options = [f"--{name.replace('_', '-')}" if name in FIXED else "url list" for name in changed]
        if changed:
            raise UserError(
                f"{directory} holds a download with another {', '.join(dict.fromkeys(options))}: "
                "use the same list and options to continue it, or another --output"
            )
    elif directory.exists() and any(directory.glob("*.tar")):
        raise UserError(f"{directory} holds shards that no download made: choose another --output")
    else:
        check_list(urls, settings)  # once: the list of a claimed directory was checked, and has not changed
        write_json_lines(provenance, [line])
    return rows


def _as_before(directory: Path, settings: Settings) -> Settings:
    first = read_json_lines(directory / PROVENANCE)[0]
    return dataclasses.replace(settings, **{name: first[name] for name in FIXED})
