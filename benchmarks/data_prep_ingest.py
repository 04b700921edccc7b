"""Rows per second and core, and peak memory, of `data-prep ingest` on a drawn list like CC12M's, in one process.

    python benchmarks/data_prep_ingest.py [--rows 12000000]

Figures of the whole command (read, clean, filter, find duplicates, write): `rows_per_cpu_s`, `rows_per_s` (by the
clock on the wall: only good on an idle machine) and `peak_bytes`; and of finding the duplicates alone, from records on
disk to a mask: `deduplication_s` and `deduplication_peak_bytes`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.record import record

ROWS_PER_BLOCK = 500_000


def main() -> None:
    """Draw the list, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_000_000, help="rows of the list")
    parser.add_argument("--folder", type=Path, help="where to put the list and the output (default: a temporary one)")
    parser.add_argument("--child", choices=("ingest", "duplicates"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_CHILDREN[options.child](options.folder, options.rows)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        size_bytes = draw_list(folder / "list.tsv", options.rows)
        whole, duplicates = (_run_child(child, folder, options.rows) for child in _CHILDREN)
    figures = {
        "rows": options.rows,
        "bytes_per_row": round(size_bytes / options.rows, 1),
        "rows_per_s": round(options.rows / whole["seconds"]),
        "rows_per_cpu_s": round(options.rows / whole["cpu_s"]),
        "peak_bytes": whole["peak_bytes"],
        "deduplication_s": round(duplicates["seconds"], 2),
        "deduplication_peak_bytes": duplicates["peak_bytes"],
    }
    print(json.dumps(figures, indent=2))
    record("data_prep", figures, f"benchmarks/data_prep_ingest.py --rows {options.rows}", repeats=1, part="ingest")


def draw_list(path: Path, rows: int) -> int:
    """Write `url TAB caption` lines: 2 % repeated urls, 6 % captions beyond ASCII, 0.1 % malformed lines."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", "S1")
    words = pa.array(["".join(map(bytes.decode, rng.choice(letters, rng.integers(2, 11)))) for _ in range(20_000)])
    with path.open("wb") as stream:
        for start in range(0, rows, ROWS_PER_BLOCK):
            count = min(ROWS_PER_BLOCK, rows - start)
            numbers = np.arange(start, start + count)
            numbers[rng.random(count) < 0.02] //= 2
            stream.write(_draw_block(numbers, words, rng))
        return stream.tell()


def _draw_block(numbers: np.ndarray, words: pa.Array, rng: np.random.Generator) -> bytes:
    count = len(numbers)

    def draw(of: np.ndarray | None = None) -> pa.Array:
        index = rng.integers(0, len(words), count) if of is None else of % len(words)
        return words.take(pa.array(index))

    parts = [draw(numbers * 7), draw(numbers * 11), draw(numbers * 13)]
    tail = pc.cast(pa.array(numbers), pa.string())
    urls = pc.binary_join_element_wise(
        "https://www.", parts[0], ".example/uploads/", parts[1], "/", parts[2], "-", tail, ".jpg", ""
    )
    captions = pc.binary_join_element_wise(*(draw() for _ in range(16)), " ")
    accents = pa.array(rng.random(count) < 0.06)
    captions = pc.if_else(accents, pc.binary_join_element_wise(captions, "caf\u00e9 \u2013", " "), captions)
    separators = pc.if_else(pa.array(rng.random(count) < 0.001), " ", "\t")
    lines = pc.binary_join_element_wise(urls, separators, captions, "\n", "")
    return b"".join(lines.cast(pa.binary()).to_pylist())


def _run_child(child: str, folder: Path, rows: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--child", child, "--folder", str(folder), "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _ingest(folder: Path, rows: int) -> dict[str, float]:
    from data_prep.lists.ingest import ingest

    return _measured(lambda: ingest([str(folder / "list.tsv")], str(folder / "urls.parquet")))


def _duplicates(folder: Path, rows: int) -> dict[str, float]:
    from data_prep.lists.exact_duplicates import DuplicateMask, sorted_records

    rows_per_part = 600_000
    sizes = [min(rows_per_part, rows - start) for start in range(0, rows, rows_per_part)]
    rng = np.random.default_rng(0)
    buckets = []
    for number, size in enumerate(sizes):
        # a tenth as many values as fit: many duplicates
        high = rng.integers(0, 10 * rows, size, dtype=np.uint64) * np.uint64(2**64 // (10 * rows))
        records, part_buckets = sorted_records(np.stack([high, high], 1))
        (folder / f"{number}.records").write_bytes(records.tobytes())
        buckets.append(part_buckets)
    del records, high
    return _measured(
        lambda: DuplicateMask(sizes).mark(buckets, lambda number: (folder / f"{number}.records").open("rb"))
    )


_CHILDREN = {"ingest": _ingest, "duplicates": _duplicates}


def _measured(work: Callable[[], object]) -> dict[str, float]:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    work()
    status = Path("/proc/self/status").read_text()
    return {
        "seconds": time.perf_counter() - start_s,
        "cpu_s": time.process_time() - start_cpu_s,
        # not getrusage's: that one begins with the peak of the process that started this one
        "peak_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024,
    }


if __name__ == "__main__":
    main()
