"""Small runs that are disturbed once, started again until they are finished, and compared with an undisturbed one.

Ranks are forked from a process that has imported everything (tests/forked_ranks.py), so that a trial takes seconds;
where a launcher is what is disturbed, the real one starts them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import RANK_ENVIRONMENT, train_tokenizer, write_shards
from forked_ranks import Program, start_program

from pipeline import train

STEPS, SAVE_EVERY_STEPS = 40, 5
_MAX_STARTS = 4
_ORPHANS_MAY_LIVE_S = 90


@dataclass(frozen=True)
class Trial:
    """What became of one disturbed run.

    exit_codes: of the disturbed start, in rank order, or a launcher's alone; negative for a signal
    identical: all files of the last checkpoint, that is weights, optimizer and generators, are the undisturbed run's
    """

    step: int
    exit_codes: tuple[int, ...]
    starts: int
    identical: bool
    notes: tuple[str, ...] = ()


@dataclass
class Run:
    """A run directory, and moments in the life of what trains there. `ranks` are process ids."""

    directory: Path
    random: Random
    ranks: list[int] = field(default_factory=list)
    launcher: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last logged step."""
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_a_moment(self, first: int = 1) -> None:
        """Until some time between a step and the end."""
        step = self.random.randrange(first, STEPS - 4)
        wait_until(lambda: self.step >= step or self.is_over())
        assert self.step >= step, f"{self.directory} ended before step {step}"
        time.sleep(self.random.uniform(0, 0.05))

    def wait_for_a_save(self) -> None:
        """Until some time while a checkpoint is being written, if one is caught at it."""
        step = self.random.randrange(1, STEPS // SAVE_EVERY_STEPS + 1) * SAVE_EVERY_STEPS
        directory = self.checkpoint(step)
        wait_until(directory.exists)
        time.sleep(self.random.uniform(0, 0.05))
        if not (directory / "COMPLETE.json").exists():
            self.notes.append("caught while saving")

    def is_over(self) -> bool:
        """Whether forked ranks have all ended; their parent may not have noticed yet."""
        return bool(self.ranks) and not any(is_alive(rank) for rank in self.ranks)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / "checkpoints" / f"step_{step:08d}"

    def newest_checkpoint(self) -> Path:
        """The last one that was published."""
        return max(path.parent for path in self.directory.glob("checkpoints/step_*/COMPLETE.json"))

    def signal(self, number: signal.Signals, *processes: int) -> None:
        """Send a signal to processes that may have ended."""
        for process in processes:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                self.notes.append("had ended before")

    def processes(self) -> list[int]:
        """Process ids of all whose command line names this run: launchers, ranks, loader workers."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # ended meanwhile
                continue
            if f"train.output={self.directory}" in words:
                found.append(int(process.name))
        return found


class Laboratory:
    """Data, options and the outcome of a run that nobody disturbs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.shards = write_shards(directory / "shards", [40, 31, 25])
        self._tokenizer = train_tokenizer(directory / "tokenizer.model")
        run = Run(directory / "undisturbed", Random(0))
        assert self.finish(run) == 1
        self._expected = files_of(run.checkpoint(STEPS))

    def options(self, run: Run) -> list[str]:
        """The command line of training that run."""
        return [
            *("--recipe", "demo", "model.name=ViT-test-8", f"data.train={self.shards}"),
            *(f"data.tokenizer={self._tokenizer}", "data.workers=0", "optimizer.warmup_steps=2"),
            *("train.global_batch_size=16", "train.micro_batch_size=8", f"train.max_steps={STEPS}"),
            *("train.log_every_steps=1", f"train.save_every_steps={SAVE_EVERY_STEPS}", f"train.output={run.directory}"),
        ]

    def forked_trial(
        self, run: Run, disturb: Callable[[Run], None], *options: str, mend: Callable[[Run], None] | None = None
    ) -> Trial:
        """Disturb forked ranks; `mend` comes before they are started again."""
        program = self.start(run, *options)
        run.ranks = [process.pid for process in program.processes if process.pid]
        disturb(run)
        step, codes = run.step, program.wait(timeout_s=120)
        if mend:
            mend(run)
        return self._end(run, step, codes)

    def launched_trial(self, run: Run, disturb: Callable[[Run], None], launcher: Sequence[str]) -> Trial:
        """Disturb what a launcher has started. Ranks that outlive it are given a while, and killed."""
        with run.directory.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [*launcher, "pipeline/train.py", *self.options(run)],
                cwd=ROOT,
                env={**os.environ, **RANK_ENVIRONMENT},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            run.launcher = process.pid
            disturb(run)
            step, code = run.step, process.wait(timeout=120)
        end_s = time.monotonic() + _ORPHANS_MAY_LIVE_S
        while run.processes() and time.monotonic() < end_s:
            time.sleep(0.1)
        if orphans := run.processes():
            run.notes.append("orphans")
            run.signal(signal.SIGKILL, *orphans)
        return self._end(run, step, [code])

    def start(
        self, run: Run, *options: str, main: Callable[[Sequence[str]], int] = train.main, **environment: str
    ) -> Program:
        """Two forked ranks, of training or of what stands for it."""
        output = run.directory.with_name(f"{run.directory.name}_output")
        return start_program(main, [*self.options(run), *options], 2, output, environment)

    def finish(self, run: Run) -> int:
        """Start a run until it is finished; how often that was."""
        for starts in range(1, _MAX_STARTS + 1):
            program = self.start(run)
            codes = program.wait(timeout_s=120)
            if codes == [0, 0]:
                return starts
        raise AssertionError(f"{run.directory} ends with {codes}, however often it is started:\n{program.output()}")

    def is_expected(self, run: Run) -> bool:
        """Whether its last checkpoint is that of the undisturbed run."""
        return files_of(run.checkpoint(STEPS)) == self._expected

    def _end(self, run: Run, step: int, codes: Sequence[int]) -> Trial:
        starts = 1 if (run.checkpoint(STEPS) / "COMPLETE.json").exists() else 1 + self.finish(run)
        return Trial(step, tuple(codes), starts, self.is_expected(run), tuple(run.notes))


def files_of(checkpoint: Path) -> dict[str, str]:
    """The sha256 of each file, by name."""
    files = json.loads((checkpoint / "COMPLETE.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items()}


def is_alive(process: int) -> bool:
    """Whether it runs, which a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Look at it every few milliseconds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.002)
