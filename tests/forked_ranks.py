"""Ranks for tests, forked from a process that has imported torch and DeepSpeed: 0.3 s a start instead of 8.

`run_ranks` calls a function in every rank; `start_program` runs one of the project's programs, as real processes that
can be sent signals. What the launchers themselves do is tested with the real ones (the `launch` fixture).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from conftest import unused_port
from waiting import PATIENCE_S, wait_for

_SERVER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# What the first step of the first engine would import; none of it starts a thread.
_PRELOADED = [
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.ops.op_builder",
    "setuptools",
    "torch.utils.tensorboard",
    "pipeline.training.training_run",
]
# When a rank has failed, the others may still be waiting for it.
_GRACE_S = 5


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    if forkserver._forkserver._forkserver_pid is None:
        context.set_forkserver_preload(_PRELOADED)
        before = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
        os.environ.update(_SERVER_ENVIRONMENT)
        forkserver.ensure_running()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _join_world(rank: int, world_size: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = PATIENCE_S
) -> list[Any]:
    """`function(ranks, *arguments)` in every rank at once, gloo between them; what each returns, in rank order.

    The function is found by its module and name in the other process, its arguments and result are pickled. Raises
    AssertionError with the traceback of the first rank that fails, or if the ranks do not end in time.
    """
    with tempfile.TemporaryDirectory() as directory:
        port = unused_port()
        processes = [
            _context().Process(target=_call, args=(function, rank, world_size, port, directory, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        ended_in_time = _wait(processes, timeout_s)
        outcomes = [Path(directory, f"{rank}.pickle") for rank in range(world_size)]
        found = [pickle.loads(path.read_bytes()) if path.exists() else None for path in outcomes]
    # a rank that lost its peer fails too: the first in time is the one to show
    failures = sorted((outcome[2], rank, outcome[1]) for rank, outcome in enumerate(found) if outcome and outcome[1])
    for _, rank, failure in failures:
        raise AssertionError(f"rank {rank} of {world_size} failed:\n{failure}")
    assert ended_in_time, f"ranks did not end within {timeout_s} s"
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world_size, f"ranks ended with {codes}"
    return [outcome[0] for outcome in found]


def _call(
    function: Callable[..., Any], rank: int, world_size: int, port: int, directory: str, arguments: tuple[Any, ...]
) -> None:
    from pipeline.ranks import init_ranks

    _join_world(rank, world_size, port)
    result, failure = None, ""
    try:
        result = function(init_ranks(), *arguments)
    except BaseException:
        failure = traceback.format_exc()
    Path(directory, f"{rank}.pickle").write_bytes(pickle.dumps((result, failure, time.monotonic())))
    # at once: torn down in order, a rank whose peers are gone is aborted by gloo's threads
    os._exit(1 if failure else 0)


def _wait(processes: Sequence[ForkServerProcess], timeout_s: float) -> bool:
    """Wait for all; when one has failed the others get a moment. What is left is killed. Whether all ended in time."""
    end_s = time.monotonic() + timeout_s
    while any(process.exitcode is None for process in processes) and time.monotonic() < end_s:
        if any(process.exitcode for process in processes):
            end_s = min(end_s, time.monotonic() + _GRACE_S)
        time.sleep(0.01)
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    return not late


@dataclass
class Program:
    """A program of the project running in ranks; `directory` has what each wrote."""

    processes: list[ForkServerProcess]
    directory: Path

    def wait(self, timeout_s: float = PATIENCE_S) -> list[int]:
        """Exit codes in rank order, negative for a signal; what runs longer is killed."""
        end_s = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, end_s - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        return [int(process.exitcode or 0) for process in self.processes]

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to these ranks, or to all."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.exitcode is None and process.pid:
                os.kill(process.pid, number)

    def wait_until_frozen(self) -> None:
        """Wait until every rank has been stopped by SIGSTOP; AssertionError if one ends instead."""
        for rank, process in enumerate(self.processes):
            wait_for(lambda process=process: self._state(process) in "TZ", "the rank to stop", self.outputs)
            assert process.exitcode is None, f"rank {rank} ended before it was stopped:\n{self.outputs()}"

    @staticmethod
    def _state(process: ForkServerProcess) -> str:
        stat = Path(f"/proc/{process.pid}/stat")
        return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else "Z"

    def outputs(self) -> str:
        """What all ranks have written so far."""
        return "\n".join(f"rank {rank}:\n{self.output(rank)}" for rank in range(len(self.processes)))

    def output(self, rank: int = 0) -> str:
        """What a rank has written so far to stdout and stderr."""
        return (self.directory / f"output_{rank}.txt").read_text(errors="replace")

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Wait until a rank has written a text; AssertionError if it ends without, or takes too long."""
        process = self.processes[rank]
        wait_for(lambda: text in self.output(rank) or process.exitcode is not None, repr(text), self.outputs)
        assert text in self.output(rank), f"ended before {text!r}:\n{self.outputs()}"


def start_program(
    main: Callable[[Sequence[str]], int],
    arguments: Sequence[str],
    world_size: int,
    directory: Path,
    environment: dict[str, str] | None = None,
) -> Program:
    """Run `main` (e.g. pipeline.train.main) as its script would, in so many ranks, from the repository's root.

    Kill what is not waited for: the ranks end with the test process, not with the test.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = unused_port()
    processes = []
    for rank in range(world_size):
        output = directory / f"output_{rank}.txt"
        output.write_text("")
        settings = (main, list(arguments), rank, world_size, port, str(output), environment or {})
        processes.append(_context().Process(target=_run_program, args=settings))
        processes[-1].start()
    return Program(processes, directory)


def _run_program(
    main: Callable[[Sequence[str]], int],
    arguments: list[str],
    rank: int,
    world_size: int,
    port: int,
    output: str,
    environment: dict[str, str],
) -> None:
    from formats.programs import run

    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)
    _join_world(rank, world_size, port)
    multiprocessing.set_start_method("fork", force=True)  # for loader processes: what a program by itself has
    os.environ.update(environment)
    sys.argv = [sys.modules[main.__module__].__file__ or "", *arguments]
    run(main)
