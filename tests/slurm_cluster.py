"""What the tests ask of Slurm: its command line, and what has become of a job."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import small_slurm
import waiting

T = TypeVar("T")
_NOT_OVER = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}


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
            timeout=waiting.PATIENCE_S,
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
        # refused where the node has come back by itself
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        states = ("sinfo", "--noheader", f"--nodes={node}", "--format=%T")
        self.wait_for(lambda: "down" not in self.run(*states).stdout, f"{node} to be back")

    def state(self, job: str) -> str:
        return self.fields(job)["JobState"]

    def is_over(self, job: str) -> bool:
        return self.state(job) not in _NOT_OVER

    def wait_for(self, condition: Callable[[], T], what: str, log: Callable[[], str] = str) -> T:
        """What the condition gives, once that is true; AssertionError with a log and the state of all jobs."""
        return waiting.wait_for(condition, what, lambda: f"{log()}\n{self.report()}")

    def wait(self, job: str, log: Callable[[], str] = str) -> dict[str, str]:
        """The fields of a job once it is over."""
        self.wait_for(lambda: self.is_over(job), f"the end of job {job}", log)
        return self.fields(job)

    def report(self) -> str:
        """What there is to say when a job does not do what it should."""
        commands = (["sinfo", "--Node"], ["squeue"], ["scontrol", "--oneliner", "show", "job"])
        controller = (self._directory / "slurmctld.log").read_text(errors="replace")
        return "\n".join([*(self.run(*command, check=False).stdout for command in commands), controller[-5000:]])
