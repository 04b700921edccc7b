"""Programs as a user runs them for whom permissions count, also where the tests run as root."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from conftest import RANK_ENVIRONMENT

from formats.programs import exit_code_of

_CAPABILITY_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2


def outcome(main: Callable[[Sequence[str]], int], arguments: Sequence[str], log: Path) -> tuple[int, str]:
    """Exit code and standard error of a program in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(main, arguments, log))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{main.__module__} {' '.join(arguments)} does not end: {log.read_text()}")
    return process.exitcode, log.read_text()


def _run(main: Callable[[Sequence[str]], int], arguments: Sequence[str], log: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(RANK_ENVIRONMENT)
    torch.set_num_threads(1)  # others that this process had did not come along when it was forked
    _forget_process_group()
    _respect_permissions()
    os._exit(exit_code_of(lambda: main(arguments)))


def _forget_process_group() -> None:
    """Let a program make its own: of one that a test has left to this process, the threads did not come along."""
    torch.distributed.distributed_c10d._update_default_pg(None)  # torch keeps it: its end would wait for them


def _respect_permissions() -> None:
    """Give up root's right to read and write all files (Linux's capset)."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    words = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; of 32 capabilities each, twice
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, words)
    words[0] &= ~(_DAC_OVERRIDE | _DAC_READ_SEARCH) & 0xFFFFFFFF
    if libc.capset(header, words):
        raise OSError(ctypes.get_errno(), "capset")
