"""How a run is asked to stop: by a signal, or by the end of the launcher that started it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Programs and modules that start ranks and that are of no use without them, nor they without it.
_LAUNCHERS = {"deepspeed", "deepspeed.pt", "ds", "torchrun"}
_LAUNCHER_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
}
_LOOK_EVERY_S = 1.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
