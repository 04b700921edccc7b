"""Stands for pipeline/train.py where a test is about the job and not about training.

The n-th start of a job does what the n-th word of OPTIONS says, a list of these joined by `+`:
save: a new checkpoint; crash: rank 1 is killed; sleep: until something ends it; wait: until told to stop; a
number: exit code
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    run = Path(next(word for word in sys.argv if word.startswith("train.output=")).partition("=")[2])
    plan = next(word for word in sys.argv if word.startswith("plan="))[5:].split(",")
    start, rank = int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["SLURM_PROCID"])
    told = []
    for action in plan[start].split("+"):
        if action == "save":
            (run / "checkpoints").mkdir(exist_ok=True)
            (run / "checkpoints" / "latest").write_text(f"step_{start}\n")
        elif action == "crash":
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)
            sys.exit(1)
        elif action in ("wait", "sleep"):
            if action == "wait":
                for number in (signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(number, lambda number, frame: told.append(number))
            (run / f"ready_{start}_{rank}").touch()
            while not told:
                time.sleep(0.05)
        else:
            sys.exit(int(action))


main()
