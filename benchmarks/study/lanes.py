"""Programs of the project, one after the other in a few lanes, forked from a process that has imported them already.

A start then takes a second instead of ten. Nothing here may touch a GPU before the fork.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_PRELOADED = ("deepspeed.runtime.engine", "torch.utils.tensorboard", "pipeline.training.training_run")

Program = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Job:
    """Programs with their arguments, one after the other as long as each ends well; what they print goes to `log`."""

    name: str
    programs: tuple[tuple[Program, tuple[str, ...]], ...]
    log: Path


def preload() -> None:
    """Import what the programs do at their start and at their first step."""
    for module in _PRELOADED:
        importlib.import_module(module)


def run_jobs(jobs: Iterable[Job], lanes: int, end_s: float, on_end: Callable[[Job, int], None]) -> None:
    """Run jobs, `lanes` at a time, in their order; at `end_s` (of time.monotonic) those under way are ended."""
    waiting = iter(jobs)
    running: list[tuple[Job, BaseProcess]] = []
    while time.monotonic() < end_s:
        while len(running) < lanes and (job := next(waiting, None)) is not None:
            process = multiprocessing.get_context("fork").Process(target=_run, args=(job,))
            process.start()
            running.append((job, process))
        if not running:
            return
        for job, process in [lane for lane in running if lane[1].exitcode is not None]:
            running.remove((job, process))
            on_end(job, int(process.exitcode or 0))
        time.sleep(0.05)
    for _, process in running:
        os.killpg(int(process.pid or 0), signal.SIGKILL)


def _run(job: Job) -> None:
    os.setsid()  # a group of its own, loader processes included, to be ended as one
    job.log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    for program, arguments in job.programs:
        process = multiprocessing.get_context("fork").Process(target=_call, args=(program, arguments))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


def _call(program: Program, arguments: Sequence[str]) -> None:
    from pipeline.entry import run

    sys.argv = [sys.modules[program.__module__].__file__ or "", *arguments]
    run(program)
