"""The processes in which a download runs: started, watched, and none survives the command.

The command starts one child (`python -m data_prep.web.processes OPTIONS_AS_JSON`), in a process group of its own, and
shows how far its workers are. The child hands the shards to its workers: processes of this machine, or img2dataset's
Spark and Ray distributors. The group ends with the command, whatever ends that: it holds the other end of the child's
standard input, so the end of that file is the end of the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.console import progress_bar
from data_prep.shards.publish import adding
from data_prep.web.ledger import OK, advice_for
from data_prep.web.passes import Pass, Settings, read_statistics
from data_prep.web.shard_worker import DEFECT, PROGRESS_DIRECTORY, ShardWorker, Task, progress_path, shards_under_way
from formats.errors import UserError
from formats.locks import holder_of, try_lock

POLL_S = 0.2
LOG = "download.log"
RERUN = "run the same command again: it goes on with the shards that are missing"
CLASSES_SHOWN = 4
ADVISE_AFTER = 1000  # urls
PREDECESSOR_S = 5.0  # the workers of a download that was killed end within this
MULTIPROCESSING = "multiprocessing"
DISTRIBUTORS = {MULTIPROCESSING: None, "pyspark": "pyspark", "ray": "ray"}  # and the package it needs
SHARDS_PER_SPARK_JOB = 1000
# albumentations, which img2dataset brings along, would ask the network for updates; wandb would log in
QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}


def check_distributor(name: str) -> None:
    """Raise UserError when the package of a distributor is not installed."""
    package = DISTRIBUTORS[name]
    if package and find_spec(package) is None:
        raise UserError(f"--distributor {name} needs the package {package}: pip install 'cluster-clip[{name}]'")


@contextlib.contextmanager
def working_in(directory: Path, share: tuple[int, int] = (0, 1)) -> Iterator[BinaryIO]:
    """Open the log of a share of the shards, and keep others from them until this process and its workers have ended.

    Raises UserError when another download, or a command that changes shards, is at work there.
    """
    index, count = share
    log_name = LOG if count == 1 else f"download_{index}_of_{count}.log"
    with adding(directory), (directory / log_name).open("ab") as log:
        give_up_s = time.monotonic() + PREDECESSOR_S
        # the workers inherit the open file as their standard output, and the lock with it
        while not try_lock(log, directory):
            if time.monotonic() > give_up_s:
                holder = holder_of(log)
                raise UserError(f"{directory}: another download is at work here, {holder}; wait for it, or end it")
            time.sleep(POLL_S)
        yield log


def fill_missing_shards(directory: Path, one: Pass, settings: Settings, log: BinaryIO) -> None:
    """Fill every shard of a pass that is not there yet, with live progress on standard error.

    `log` is from `working_in`. Raises UserError when shards are still missing afterwards; the same call goes on.
    """
    _clean_up(directory, one)  # after a run that was killed
    (directory / PROGRESS_DIRECTORY).mkdir(parents=True, exist_ok=True)
    log_start = log.seek(0, os.SEEK_END)
    try:
        with _child(directory, one, settings, log) as child:
            _show_progress(child, directory, one)
            ending = child.poll()
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {RERUN}") from None
    missing = len(one.missing(directory))
    if missing:
        reason = f"ended with {_describe(ending)}" if ending else "gave up on them"
        said, is_defect = _last_error(Path(log.name), log_start)
        advice = "this is a defect, which the same command would meet again: please report it" if is_defect else RERUN
        count = f"{missing} of {len(one.numbers)} shards are missing"
        raise UserError(f"{count}: the download {said or reason}, see {log.name}; {advice}")
    _clean_up(directory, one)


def _clean_up(directory: Path, one: Pass) -> None:
    """Remove what is only there while shards are made."""
    for path in (*directory.glob(".[0-9]*.part"), *(directory / PROGRESS_DIRECTORY).glob("[0-9]*.json")):
        if int(re.findall(r"\d+", path.name)[0]) in one.numbers:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another share still uses it
        (directory / PROGRESS_DIRECTORY).rmdir()


@contextlib.contextmanager
def _child(directory: Path, one: Pass, settings: Settings, log: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    options = {
        "directory": str(directory.resolve()),
        "pass": dataclasses.asdict(one) | {"urls": str(one.urls.resolve())},
        "settings": dataclasses.asdict(settings),
    }
    # the workers of Spark and Ray do not inherit where this package is imported from
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as scratch:
        options_file = Path(scratch) / "options.json"
        options_file.write_text(json.dumps(options), encoding="utf-8")
        child = subprocess.Popen(
            [sys.executable, "-m", "data_prep.web.processes", str(options_file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths), "PYSPARK_PYTHON": sys.executable},
        )
        try:
            yield child
        finally:
            # the group outlives its leader: the pool has processes of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _show_progress(child: subprocess.Popen[bytes], directory: Path, one: Pass) -> None:
    """Return when every shard is there or the child has ended."""
    waiting = set(one.numbers)
    rows = sum(stop - start for start, stop in map(one.rows_of, waiting))
    finished: Counter[str] = Counter()
    advised: set[str] = set()
    bar = None
    to_look_at = waiting.copy()  # all of them once; then those that a worker is at, however many there are
    try:
        while waiting:
            # asked before looking at the files, so that the last look comes after the end
            running = child.poll() is None
            under_way: Counter[str] = Counter()
            for shard in to_look_at:
                progress = progress_path(directory, shard)
                if statistics := read_statistics(directory, shard):
                    finished.update(statistics["outcomes"])
                    waiting.remove(shard)
                    progress.unlink(missing_ok=True)
                else:
                    with contextlib.suppress(OSError, ValueError):
                        under_way.update(json.loads(progress.read_text(encoding="utf-8")))
            counts = finished + under_way
            bar = bar or progress_bar("download", rows, "img", initial=finished.total())
            if counts.total() > bar.n:
                bar.set_postfix_str(_shares(counts), refresh=False)
                bar.update(counts.total() - bar.n)
                for line in advice_for(counts) if counts.total() >= ADVISE_AFTER else []:
                    if line.split()[0] not in advised:
                        advised.add(line.split()[0])
                        bar.write(f"advice: {line}", file=sys.stderr)
            if not running:
                return
            time.sleep(POLL_S)
            to_look_at = waiting.intersection(shards_under_way(directory))
    finally:
        if bar is not None:
            bar.close()


def _shares(counts: Counter[str]) -> str:
    """`91.2% ok, dns 4.1%, 4xx 3.0%`: the success rate, then the most frequent failures."""
    total = counts.total()
    failures = [(name, count) for name, count in counts.most_common() if name != OK][:CLASSES_SHOWN]
    return ", ".join([f"{counts[OK] / total:.1%} ok", *(f"{name} {count / total:.1%}" for name, count in failures)])


def _last_error(log: Path, start: int) -> tuple[str, bool]:
    """What a worker said last when it could not write a shard, and whether a rerun cannot mend it."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("error: ", DEFECT))]
    if not said:
        return "", False
    return f"said {said[-1].partition(': ')[2]!r}", all(line.startswith(DEFECT) for line in said)


def _describe(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"code {returncode}"


def _run_child(options: dict[str, Any]) -> None:
    """Fill the missing shards of one pass; `options` are what `_child` writes."""
    one, settings = Pass.from_json(options["pass"]), Settings.from_json(options["settings"])
    directory = Path(options["directory"])
    tasks = [(shard, one.rows_of(shard)) for shard in one.missing(directory)]
    worker = ShardWorker(directory, one, settings)
    if settings.distributor == MULTIPROCESSING:
        try:
            _on_this_machine(worker, tasks, settings.processes)
        except BrokenProcessPool:
            advice = "use fewer --processes; a picture that ends its worker twice is left out"
            print(f"error: a worker process was killed (out of memory?): {advice}", flush=True)
        return
    from img2dataset.distributor import pyspark_distributor, ray_distributor

    run = {"pyspark": pyspark_distributor, "ray": ray_distributor}[settings.distributor]
    run(settings.processes, worker, tasks, SHARDS_PER_SPARK_JOB, 1)


def _on_this_machine(worker: ShardWorker, tasks: Sequence[Task], processes: int) -> None:
    # unlike a multiprocessing.Pool, this one notices when a worker is killed, and ends instead of waiting for it
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        pending: set[Future[tuple[bool, Task]]] = set()
        for task in tasks:
            if len(pending) == 2 * processes:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
            pending.add(pool.submit(worker, task))
        for future in pending:
            future.result()


def _end_with_parent() -> None:
    """Wait for the end of standard input, then kill the process group, pool workers included."""
    # the descriptor itself: a thread inside sys.stdin's lock would abort the interpreter's shutdown
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run_child(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
