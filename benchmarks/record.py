"""Writing benchmarks/results/NAME.json: figures with the command, commit and machine that made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

RESULTS_DIRECTORY = Path(__file__).parent / "results"


def record(
    name: str,
    figures: dict[str, Any],
    command: str,
    repeats: int,
    part: str | None = None,
    note: str | None = None,
    keep_others: bool = False,
) -> Path:
    """Write one result and return its path; `repeats` is how often each figure was measured.

    With `part` the figures go under that key and the other parts of the result stay as they are, as with `keep_others`
    all figures do that are not written anew; command, commit, machine, repeats and date are those of what was written
    last. `note`: what has to be known beside all that.
    """
    path = RESULTS_DIRECTORY / f"{name}.json"
    if part is not None or keep_others:
        before = json.loads(path.read_text())["figures"] if path.exists() else {}
        figures = {**before, **({part: figures} if part is not None else figures)}
    result = {
        "name": name,
        "figures": figures,
        "command": command,
        "commit": _commit(),
        "machine": _machine(),
        "repeats": repeats,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if note:
        result["note"] = note
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{len(os.sched_getaffinity(0))} x {model}, {platform.system()}"
