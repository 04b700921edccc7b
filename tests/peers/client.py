"""Talks to tests/peers/peer.py, one process for all commands, in the environment of `make peers`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peers_python() -> Path | None:
    """The interpreter that PEERS_PYTHON names, else that of .peers, else None."""
    named = os.environ.get("PEERS_PYTHON")
    python = Path(named) if named else ROOT / ".peers" / "bin" / "python"
    return python if named or python.exists() else None


class Peer:
    """Call it with a command of peer.py and its arguments; an error there is a RuntimeError here."""

    def __init__(self, python: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str, *arguments: str | Path) -> str | None:
        """The command's result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, *map(str, arguments)]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with exit code {self._process.wait()} at {command}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error'][-4000:]}")
        result: str | None = answer["result"]
        return result

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)
