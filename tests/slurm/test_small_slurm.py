"""The private Slurm itself: several at once, as any user, and nothing left of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import small_slurm
from waiting import wait_for

pytestmark = pytest.mark.skipif(bool(small_slurm.missing_programs()), reason="no slurm-wlm and munge")

STARTER = """
import subprocess, sys
guardian = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE, start_new_session=True)
guardian.wait()
"""


def processes_of(directory: Path) -> list[str]:
    mark = f"SLURM_CONF={directory}/slurm.conf".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_daemons_and_jobs_end_with_whoever_started_them(short_path: Path) -> None:
    command = [sys.executable, "-c", STARTER, small_slurm.__file__, str(short_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
        stubborn = "trap : TERM; touch running; while true; do sleep 1; done"
        submit = ["sbatch", "--nodes=2", f"--chdir={short_path}", "--output=/dev/null", f"--wrap={stubborn}"]
        subprocess.run(submit, env=small_slurm.environment(short_path), check=True, stdout=subprocess.DEVNULL)
        wait_for((short_path / "running").exists, "the job")
        assert len(processes_of(short_path)) > len(small_slurm.NODES) + 2
        starter.kill()
    wait_for(lambda: not processes_of(short_path), "the end of all daemons and jobs")
