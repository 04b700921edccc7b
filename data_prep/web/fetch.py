"""The process in which downloads run: `python -m data_prep.web.fetch OPTIONS_AS_JSON`, started by `child.py`.

It lives in a process group of its own and ends with its parent, whatever ends the parent: the parent holds the
other end of this process's standard input, so the end of that file is the end of the parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from data_prep.web.distributors import distribute
from data_prep.web.ledger import Pass
from data_prep.web.settings import Settings
from data_prep.web.shard_worker import ShardWorker


def end_with_parent() -> None:
    """Wait for the end of standard input, then kill the process group, pool workers included."""
    # the descriptor itself: a thread inside sys.stdin's lock would abort the interpreter's shutdown
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def fetch(options: dict[str, Any]) -> None:
    """Fill the missing shards of one pass; `options` are the fields of `Pass` and `Settings`, and the directory."""
    settings = Settings(**options["settings"] | {"nameservers": tuple(options["settings"]["nameservers"])})
    share: tuple[int, int] = tuple(options["pass"]["share"])
    one = Pass(**options["pass"] | {"urls": Path(options["pass"]["urls"]), "share": share})
    directory = Path(options["directory"])
    tasks = [(shard, one.rows_of(shard)) for shard in one.missing(directory)]
    distribute(settings.distributor, ShardWorker(directory, one, settings), tasks, settings.processes)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    fetch(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
