"""Training jobs on a private Slurm of two nodes (tests/small_slurm.py), each disturbed once while it trains."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fault_trials import ROOT, SAVE_EVERY_STEPS, Laboratory, Run, Trial, wait_until
from slurm_cluster import Cluster
from small_slurm import NODES


@dataclass
class Job:
    """A training job, through slurm/train.sbatch, and the run that it trains; `id` of the last submission."""

    run: Run
    cluster: Cluster
    recipe: str
    options: list[str]
    id: str = ""

    def submit(self) -> None:
        """Queue it, with the settings of any user."""
        size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=10"]
        self.id = self.cluster.run(
            *("sbatch", "--parsable", *size, f"--output={self.log}", ROOT / "slurm" / "train.sbatch"),
            RUN=self.run.directory,
            RECIPE=self.recipe,
            OPTIONS=" ".join(self.options),
        ).stdout.strip()

    @property
    def log(self) -> Path:
        """Its output, of all starts."""
        return self.run.directory.with_suffix(".log")

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [pid for pid in self.run.processes() if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes()]

    @contextmanager
    def frozen_until_asked(self) -> Iterator[None]:
        """Ranks stand still until Slurm has asked the job to stop: so small a run would be over before."""
        ranks = self.ranks()
        self.run.signal(signal.SIGSTOP, *ranks)
        yield
        wait_until(lambda: "asked to stop" in self.log.read_text())
        self.run.signal(signal.SIGCONT, *ranks)


def preempt(job: Job) -> None:
    """A job of a partition with priority needs the nodes."""
    with job.frozen_until_asked():
        job.cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def reach_the_time_limit(job: Job) -> None:
    """It comes nearer than what `--signal` asks for."""
    with job.frozen_until_asked():
        job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=1")
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=10")  # for the next start


def requeue(job: Job) -> None:
    """As an administrator does."""
    job.cluster.run("scontrol", "requeue", job.id)


def cancel_and_submit_again(job: Job) -> None:
    """As a user does."""
    job.cluster.run("scancel", job.id)
    assert job.cluster.wait(job.id)["JobState"] == "CANCELLED"
    job.submit()


def kill_a_rank(job: Job) -> None:
    """On either node."""
    job.run.signal(signal.SIGKILL, job.run.random.choice(job.ranks()))


def fail_a_node(job: Job) -> None:
    """Either of the two, with all that runs there; it is back after a second."""
    node = job.run.random.choice(NODES)
    job.cluster.fail_node(node)
    time.sleep(1)
    job.cluster.mend_node(node)


def slurm_trial(laboratory: Laboratory, cluster: Cluster, run: Run, disturb: Callable[[Job], None]) -> Trial:
    """Disturb a job after its first checkpoint, and wait until Slurm has brought it to its end."""
    _, recipe, *options = laboratory.options(run)
    job = Job(run, cluster, recipe, options)
    job.submit()
    first = job.id
    run.wait_for_a_moment(first=SAVE_EVERY_STEPS + 2)
    step = run.step
    disturb(job)
    fields = cluster.wait(job.id)
    assert fields["JobState"] == "COMPLETED", job.log.read_text()
    starts = 1 + int(fields["Restarts"]) + (job.id != first)
    return Trial(step, (), starts, laboratory.is_expected(run), tuple(run.notes))
