"""Real launchers that are asked to stop: nothing is lost and nothing is left running, whoever gets the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import RANK_ENVIRONMENT, ROOT
from waiting import PATIENCE_S

from pipeline.training.checkpoints.checkpoint import newest_checkpoint

DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_accelerators=2", "--master_port={port}"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"]


def to_the_launcher(launcher: psutil.Process) -> None:
    launcher.send_signal(signal.SIGTERM)


def to_all_as_a_terminal_does(launcher: psutil.Process) -> None:
    """Upon which the launcher's inner process sends SIGTERM to one rank and its loader processes after the other."""
    os.killpg(launcher.pid, signal.SIGINT)


Case = tuple[list[str], Callable[[psutil.Process], None]]
CASES: dict[str, Case] = {
    "deepspeed": (DEEPSPEED, to_the_launcher),
    "Ctrl-C": (DEEPSPEED, to_all_as_a_terminal_does),
    "torchrun": (TORCHRUN, to_the_launcher),
}


class LaunchedRun:
    """A run under a launcher, in a process group of its own; nobody reads its output to the end."""

    def __init__(self, name: str, directory: Path, options: list[str], port: int) -> None:
        self.name = name
        self.directory = directory
        command, self._signal = CASES[name]
        self._process = subprocess.Popen(
            [
                *(word.format(port=port) for word in command),
                "pipeline/train.py",
                *options,
                f"train.output={directory}",
            ],
            cwd=ROOT,
            env={**os.environ, **RANK_ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._all: list[psutil.Process] = []

    def is_training(self) -> bool:
        """Whether a step was logged by now."""
        assert self._process.poll() is None, self._process.stdout and self._process.stdout.read()
        metrics = self.directory / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_size > 0

    def stop(self) -> None:
        """Send the signal; who reads the output is gone."""
        launcher = psutil.Process(self._process.pid)
        self._all = [launcher, *launcher.children(recursive=True)]
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._signal(launcher)

    def left_running(self) -> list[psutil.Process]:
        """Processes that have not ended."""
        self._process.poll()
        return [process for process in self._all if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """Leave nothing behind, whatever the test found."""
        for process in self.left_running():
            process.kill()
        self._process.kill()
        self._process.wait()


@pytest.fixture
def runs(tmp_path: Path, tiny_options: list[str], free_port: Callable[[], int]) -> Iterator[list[LaunchedRun]]:
    """One run for each case, all at once: most of their time is spent waiting."""
    options = [*tiny_options, "train.deepspeed_config=zero1_fp32", "train.max_steps=100000"]
    options += ["train.save_every_steps=100000", "data.workers=1"]
    runs = [LaunchedRun(name, tmp_path / name, options, free_port()) for name in CASES]
    yield runs
    for run in runs:
        run.kill()


@pytest.mark.slow
def test_launchers_that_are_stopped_save_and_leave_nothing_running(runs: list[LaunchedRun]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    waiting = list(runs)
    while waiting:
        assert time.monotonic() < deadline_s, [run.name for run in waiting]
        for run in [run for run in waiting if run.is_training()]:
            run.stop()
            waiting.remove(run)
        time.sleep(0.1)
    while any(run.left_running() for run in runs) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for run in runs:
        assert run.left_running() == [], run.name
        checkpoint = newest_checkpoint(run.directory)
        assert checkpoint is not None, run.name
        last = (run.directory / "metrics.jsonl").read_text().splitlines()[-1]
        assert f'"step": {int(checkpoint.name[5:])},' in last, run.name
