from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from data_prep.parallel import map_in_processes
from formats.errors import UserError


@pytest.mark.parametrize("processes", [1, 2])
def test_every_item_is_mapped_once(processes: int) -> None:
    assert sorted(map_in_processes(abs, range(-20, 0), processes)) == list(range(1, 21))
    assert list(map_in_processes(abs, [], processes)) == []


def test_items_are_drawn_as_they_are_needed() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(1000):
            drawn += 1
            yield number

    results = map_in_processes(abs, items(), 2)
    next(results)
    assert drawn < 10
    results.close()  # type: ignore[attr-defined]


def test_a_killed_worker_is_one_error() -> None:
    with pytest.raises(UserError, match="worker process was killed"):
        list(map_in_processes(os._exit, [1], 2))


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom data_prep.parallel import map_in_processes\n"
        "def work(name):\n    Path(name).write_text(str(os.getpid()))\n    time.sleep(3600)\n"
        "if __name__ == '__main__':\n    list(map_in_processes(work, sys.argv[1:], 2))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    names = [tmp_path / "a", tmp_path / "b"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    parent = subprocess.Popen([sys.executable, script, *names], env=environment)
    wait_for(lambda: all(name.exists() and name.read_text() for name in names), "the workers")
    parent.kill()
    parent.wait()
    workers = [int(name.read_text()) for name in names]
    wait_for(lambda: not any(map(is_running, workers)), "their end")


def is_running(process: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
