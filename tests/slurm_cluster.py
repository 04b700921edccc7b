"""What the tests ask of Slurm: its command line, and what has become of a job."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import small_slurm

T = TypeVar("T")
_POLL_S = 0.05
_NOT_OVER = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = 60) -> T:
    """What the condition gives, once that is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(_POLL_S)
    return value


class Cluster:
    """A running cluster as a user has it, who calls from a checkout with some variables set."""

    def __init__(self, directory: Path, checkout: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._checkout = checkout
        self._environment = small_slurm.environment(directory) | environment

    def run(
        self, *command: str | Path, check: bool = True, **variables: str | Path
    ) -> subprocess.CompletedProcess[str]:
        """A command, from the checkout, with these variables in its environment."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self._environment | {name: str(value) for name, value in variables.items()},
            cwd=self._checkout,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of the last task of an array."""
        line = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()[-1]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def fail_node(self, node: str) -> None:
        """A node is lost with all that runs on it. The controller is told at once what it would find out in 30 s."""
        small_slurm.fail_node(self._directory, node)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def mend_node(self, node: str) -> None:
        """The node is back."""
        small_slurm.start_node(self._directory, node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def state(self, job: str) -> str:
        return self.fields(job)["JobState"]

    def wait(self, job: str, timeout_s: float = 120) -> dict[str, str]:
        """The fields of a job once it is over."""
        wait_for(lambda: self.state(job) not in _NOT_OVER, f"the end of job {job}", timeout_s)
        return self.fields(job)
