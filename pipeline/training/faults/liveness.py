"""Whether a run goes on: it ends when it stands still, and stops when it is asked to.

Each rank's main thread beats once a step. When one has not for too long, it writes the stacks of its threads and of its
loader processes to `stacks_rankR.txt` in the run directory, asks the other ranks through a file there to do the same,
and ends with EXIT_HUNG. A run is asked to stop by a signal, or by the end of the launcher that started it.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from pipeline.ranks import Ranks

# EX_SOFTWARE of sysexits.h. Nothing was saved, but the same command goes on from the last checkpoint.
EXIT_HUNG = 70
# The first step, saving and evaluation may take so many times as long as a step.
_PATIENCE = 3
_LOOK_EVERY_S = 1.0
# Other ranks hear of it, and their stacks are on the disk, before the first one ends and they fail for want of it; a
# node may look at a shared directory only every half minute.
_OTHERS_S = 40.0
_REQUEST = "stacks_wanted_"

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Programs and modules that start ranks and that are of no use without them, nor they without it.
_LAUNCHERS = {"deepspeed", "deepspeed.pt", "ds", "torchrun"}
_LAUNCHER_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Watchdog:
    """Of one rank. Whatever stops the whole process, like SIGSTOP, is no hang of its own."""

    def __init__(self, run_directory: Path, ranks: Ranks, hang_timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = hang_timeout_s
        self._run_directory = run_directory
        self._path = run_directory / f"stacks_rank{ranks.rank}.txt"
        self._closed = threading.Event()
        self._deadline_s = 0.0

    def start(self) -> None:
        """Watch from now on; the run directory exists. Collective."""
        self.expect_long()
        if self._ranks.is_main:
            for old in self._run_directory.glob(f"{_REQUEST}*"):
                old.unlink()
        # a name of this start's: other nodes may still see what an earlier one left
        self._request = self._run_directory / self._ranks.from_main(lambda: f"{_REQUEST}{time.time_ns()}")
        # loader processes are forked from this one: they know the signal too, and write to the same file
        self._file = self._path.open("a")
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """A step is done: the next is expected in time."""
        self._deadline_s = time.monotonic() + self._timeout_s

    def expect_long(self) -> None:
        """What comes now may take longer than a step, up to the next beat."""
        self._deadline_s = time.monotonic() + _PATIENCE * self._timeout_s

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Around something that takes longer than a step."""
        self.expect_long()
        yield
        self.beat()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        if not self._path.stat().st_size:
            self._path.unlink()

    def _watch(self) -> None:
        looked_s = time.monotonic()
        while not self._closed.wait(_LOOK_EVERY_S):
            now_s = time.monotonic()
            self._deadline_s += max(0.0, now_s - looked_s - 2 * _LOOK_EVERY_S)  # this process did not run
            looked_s = now_s
            # should Python's lock be held for ever, this thread cannot run: then the interpreter's own timer ends it
            faulthandler.dump_traceback_later(_PATIENCE * self._timeout_s + _OTHERS_S, exit=True, file=self._file)
            if now_s > self._deadline_s:
                self._end(f"no step within {self._timeout_s:g} s")
            elif self._request.exists():
                self._end("another rank stands still")

    def _end(self, why: str) -> None:
        with contextlib.suppress(OSError):  # a full disk keeps nobody from ending
            self._request.touch()
            sys.stderr.write(self._write_stacks(why))
        sys.stderr.write(
            f"error (rank {self._ranks.rank}): {why} (faults.hang_timeout_s): the stacks of all ranks are in "
            f"{self._run_directory}/stacks_rank*.txt; ending with {EXIT_HUNG}, the last checkpoint is intact\n"
        )
        sys.stderr.flush()
        time.sleep(min(_OTHERS_S, self._timeout_s))
        os._exit(EXIT_HUNG)

    def _write_stacks(self, why: str) -> str:
        """Returns what was written."""
        start = self._path.stat().st_size
        self._file.write(f"\n{time.strftime('%FT%TZ', time.gmtime())} rank {self._ranks.rank}: {why}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        for process in psutil.Process().children():
            self._file.write(f"\nloader process {process.pid}\n")
            self._file.flush()
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGUSR2)
            time.sleep(0.2)
        with self._path.open() as file:
            file.seek(start)
            return file.read()


class StopRequest:
    """Whether this process was asked to stop. It only notes so: all signals after the first change nothing."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def __bool__(self) -> bool:
        return self._reason is not None

    def listen(self) -> None:
        """From now on signals and the end of the launcher are requests; from the main thread."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's background jobs have it
                signal.signal(number, self._on_signal)
        # who reads the output, `tee` for one, may be killed by the same signal, and the last words are written after it
        sys.stdout, sys.stderr = _outlasting(sys.stdout), _outlasting(sys.stderr)
        launchers = _launchers()
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), daemon=True, name="launcher watch").start()

    def ask(self, reason: str) -> None:
        """Note the first request and say so."""
        if self._reason is None:
            self._reason = reason
            rank = os.environ.get("RANK", "0")
            # not print: a signal may come in the middle of one
            _write(f"rank {rank}: {reason}: all ranks stop and save within two steps (Ctrl-\\ ends them at once)\n")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def _watch(self, launchers: list[psutil.Process]) -> None:
        ended = threading.Event()
        while all(_is_alive(launcher) for launcher in launchers):
            ended.wait(_LOOK_EVERY_S)
        self.ask("the launcher is gone")


def _launchers() -> list[psutil.Process]:
    """The launchers that this process descends from, nearest first: of `deepspeed` there are two, one the other's."""
    found = []
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:
            break
        if not any(word in _LAUNCHER_MODULES or Path(word).name in _LAUNCHERS for word in words):
            break
        found.append(process)
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, text.encode())


class _Outlasting(io.TextIOBase):
    """A stream that may lose its reader, or its room on a disk: what nobody can read is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of any text stream."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of any stream."""
        with self._dropping():
            self._stream.flush()

    def fileno(self) -> int:
        """As of any stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """As of any stream."""
        return self._stream.isatty()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except OSError as error:
            if error.errno not in _NO_ROOM:  # there may be room again
                raise


def _outlasting(stream: TextIO) -> TextIO:
    return stream if isinstance(stream, _Outlasting) else _Outlasting(stream)  # type: ignore[return-value]
