"""A command that is killed at a given change of its files, however fast the machine is.

    python tests/killed_at.py PATTERN NUMBER -m MODULE ARGUMENT…    # or -c CODE ARGUMENT…

It and all processes that it started get SIGKILL when it is about to make a path that matches PATTERN for the NUMBER-th
time, by a rename or as a directory.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


def kill_at(pattern: Path, *command: str, number: int = 1) -> None:
    """Run `python *command` until then. AssertionError with its output if it ends by itself."""
    done = subprocess.run(
        [sys.executable, __file__, str(pattern), str(number), *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, f"{pattern} was not made {number} times:\n{done.stdout}"


def main() -> None:
    """Run the command in this process."""
    pattern, number, kind, target = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    calls = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        made = {"os.rename": 1, "os.mkdir": 0}.get(event)
        if made is not None and fnmatch(os.fspath(arguments[made]), pattern) and next(calls) == number:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv, sys.path[0] = [target, *sys.argv[5:]], ""
    if kind == "-m":
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        exec(target, {"__name__": "__main__"})


if __name__ == "__main__":
    main()
