"""Download the images of a canonical parquet into shards, with img2dataset in a child process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.console import progress_bar
from data_prep.errors import UserError
from data_prep.files import read_json_lines, sha256_of, write_json_lines
from data_prep.outcomes import OK, OTHER, count_outcomes, print_outcomes
from data_prep.verify import DATASET, MANIFEST, PROVENANCE

POLL_S = 0.2
LOG = "download.log"
RERUN = "run the same command again: it goes on with the shards that are missing"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to download; the first three decide what the shards hold and may not change between runs."""

    image_size: int = 256
    resize_mode: str = "keep_ratio"
    samples_per_shard: int = 10_000
    processes: int = 1
    threads: int = 64
    timeout_s: int = 10
    retries: int = 2


def download(urls: Path, directory: Path, settings: Settings) -> Counter[str]:
    """Fetch every url of a canonical parquet (see `ingest`) into shards in `directory`.

    Images larger than `image_size` pixels are scaled down, none is scaled up. Shards that are already there are
    kept, so the same command continues an interrupted run. Prints the outcomes by class and returns them.

    Raises UserError when the list cannot be used, the directory holds another download, img2dataset dies, or
    not a single image could be had.
    """
    rows = _check_urls(urls)
    shards = math.ceil(rows / settings.samples_per_shard)
    _claim(directory, urls, rows, settings)
    for path in _finished(directory):
        if not _read_stats(path):  # cut off in the writing: img2dataset would take the shard for done
            path.unlink()
    if len(_finished(directory)) < shards:
        # what these say about the directory ends here; verify writes them anew
        (directory / DATASET).unlink(missing_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)
        _run(urls, directory, settings, rows, shards)
    counts = count_outcomes(sorted(directory.glob("[0-9]*.parquet")))
    counts[OTHER] += rows - counts.total()
    print_outcomes(+counts)
    if not counts[OK]:
        raise UserError(
            f"none of {rows:,} urls gave an image (outcomes above): check the network and the url list, "
            f"then delete {directory} and run again"
        )
    return +counts


def _check_urls(urls: Path) -> int:
    """The number of rows; every url must be http(s), because img2dataset would read local files too."""
    if not urls.is_file():
        raise UserError(f"{urls}: no such file; make it with `data-prep ingest`")
    try:
        file = pq.ParquetFile(urls)
        absent = [name for name in ("uid", "url", "caption") if name not in file.schema_arrow.names]
        if absent:
            raise UserError(f"{urls} has no column {', '.join(absent)}: bring it into form with `data-prep ingest`")
        for batch in file.iter_batches(columns=["url"]):
            passes = pc.match_substring_regex(batch["url"].cast(pa.string()), r"^(?i:https?)://").fill_null(False)
            if not pc.all(passes, min_count=0).as_py():
                raise UserError(f"{urls} has urls that are not http(s): filter them with `data-prep ingest`")
    except pa.ArrowException as error:
        raise UserError(f"{urls}: {str(error).splitlines()[0]}") from error
    rows = int(file.metadata.num_rows)
    if not rows:
        raise UserError(f"{urls} has no rows")
    return rows


def _claim(directory: Path, urls: Path, rows: int, settings: Settings) -> None:
    """Note what is downloaded where; refuse a directory that holds something else."""
    line = {
        "step": "download",
        "urls": urls.name,
        "urls_sha256": sha256_of(urls),
        "rows": rows,
        "image_size": settings.image_size,
        "resize_mode": settings.resize_mode,
        "samples_per_shard": settings.samples_per_shard,
    }
    provenance = directory / PROVENANCE
    before = read_json_lines(provenance)
    if before:
        changed = [name for name in line if before[-1].get(name) != line[name]]
        if changed:
            raise UserError(
                f"{directory} holds a download with another {', '.join(changed)}: "
                "use the same list and options to continue it, or another --output"
            )
    elif directory.exists() and any(directory.glob("*.tar")):
        raise UserError(f"{directory} holds shards that no download made: choose another --output")
    else:
        write_json_lines(provenance, [line])


def _run(urls: Path, directory: Path, settings: Settings, rows: int, shards: int) -> None:
    """Let img2dataset do what is missing and show its progress; no process survives this function."""
    log = directory / LOG
    try:
        with _child(urls, directory, settings, log) as child:
            _show_progress(child, directory, rows, shards)
            ending = child.poll()
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {RERUN}") from None
    missing = shards - len(_finished(directory))
    if missing:
        reason = f"ended with {_describe(ending)}" if ending else "gave up on them"
        raise UserError(f"{missing} of {shards} shards are missing: img2dataset {reason}, see {log}; {RERUN}")
    shutil.rmtree(directory / "_tmp", ignore_errors=True)


@contextlib.contextmanager
def _child(urls: Path, directory: Path, settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    options = {"urls": str(urls.resolve()), "directory": str(directory.resolve()), **dataclasses.asdict(settings)}
    with tempfile.TemporaryDirectory() as scratch, log.open("ab") as log_stream:
        options_file = Path(scratch) / "options.json"
        options_file.write_text(json.dumps(options), encoding="utf-8")
        child = subprocess.Popen(
            [sys.executable, "-m", "data_prep.fetch", str(options_file)],
            stdin=subprocess.PIPE,
            stdout=log_stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            # the group outlives its leader: img2dataset's pool has processes of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _show_progress(child: subprocess.Popen[bytes], directory: Path, rows: int, shards: int) -> None:
    """Return when every shard is there or the child has ended."""
    seen: dict[Path, dict[str, Any]] = {}
    already = sum(_read_stats(path)["count"] for path in _finished(directory))
    with progress_bar("download", rows, "img", initial=already) as progress:
        # img2dataset idles for seconds after the last shard: do not wait for it
        while len(seen) < shards:
            # asked before looking at the files, so that the last look comes after the end
            running = child.poll() is None
            fresh = {path: _read_stats(path) for path in _finished(directory) if path not in seen}
            seen.update((path, stats) for path, stats in fresh.items() if stats)
            done = sum(stats["count"] for stats in seen.values())
            if done > progress.n:
                share = sum(stats["successes"] for stats in seen.values()) / done
                progress.set_postfix_str(f"{share:.1%} ok", refresh=False)
                progress.update(done - progress.n)
            if not running:
                return
            time.sleep(POLL_S)


def _finished(directory: Path) -> list[Path]:
    """img2dataset writes a shard's statistics last: they say that the shard is whole."""
    return sorted(directory.glob("[0-9]*_stats.json"))


def _read_stats(path: Path) -> dict[str, Any]:
    try:
        stats: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # being written
        return {}
    return stats


def _describe(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"code {returncode}"
