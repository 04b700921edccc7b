"""Work in a few processes, forked from one that has imported everything: what a process begins with is paid once.

Nothing here may touch a GPU before the fork.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PRELOADED = ("deepspeed.runtime.engine", "torch.utils.tensorboard", "pipeline.training.training_run")


@dataclass(frozen=True)
class Job:
    """A recipe to train, perhaps with one of experiments.py; what is printed goes to `log`."""

    name: str
    recipe: Path
    log: Path
    experiment: str | None = None


OnEnd = Callable[[Job, bool], None]


def preload() -> None:
    """Import what training imports at its start and at its first step."""
    for module in _PRELOADED:
        importlib.import_module(module)


def run_jobs(
    work: Callable[[Job], None],
    jobs: Sequence[Job],
    lanes: int,
    end_s: float,
    on_end: OnEnd,
) -> None:
    """Give jobs to `lanes` processes in their order; at `end_s` (of time.monotonic) those under way are ended.

    A lane that is asked to stop (SIGTERM) takes no further job, and all are when this process is.

    on_end: with every job that has ended, and whether it went well
    """
    context = multiprocessing.get_context("fork")
    waiting, ended = context.Queue(), context.Queue()
    for number in [*range(len(jobs)), *[None] * lanes]:
        waiting.put(number)
    processes = [context.Process(target=_lane, args=(work, jobs, waiting, ended)) for _ in range(lanes)]
    for process in processes:
        process.start()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        _wait(processes, jobs, ended, end_s, on_end)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    for process in processes:
        if process.is_alive():
            os.killpg(int(process.pid or 0), signal.SIGKILL)


def _wait(processes: Sequence[Any], jobs: Sequence[Job], ended: Any, end_s: float, on_end: OnEnd) -> None:
    while time.monotonic() < end_s:
        alive = any(process.is_alive() for process in processes)
        try:
            number, is_well = ended.get(timeout=0.2)
        except queue.Empty:
            if not alive:
                return
            continue
        on_end(jobs[number], is_well)


def _lane(work: Callable[[Job], None], jobs: Sequence[Job], waiting: Any, ended: Any) -> None:
    os.setsid()  # a group of its own, loader processes included, to be ended as one
    while True:
        for asked in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(asked, signal.SIG_DFL)  # training listens to these, and notes them for the run that is over
        if (number := waiting.get()) is None:
            return
        job = jobs[number]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
        try:
            work(job)
            is_well = True
        except Exception:
            traceback.print_exc()
            is_well = False
        sys.stdout.flush()
        sys.stderr.flush()
        ended.put((number, is_well))
