"""When a training job is queued again: a real Slurm, and in place of training what each start is to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_cluster import Cluster

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """A training job whose starts follow a plan."""

    id: str
    run: Path
    cluster: Cluster

    @property
    def log(self) -> str:
        return (self.run / "log").read_text() if (self.run / "log").exists() else "no log"

    @property
    def saved(self) -> str:
        return (self.run / "checkpoints" / "latest").read_text().strip()

    def wait_until_ready(self, start: int = 0) -> None:
        for rank in range(2):
            ready = self.run / f"ready_{start}_{rank}"
            self.cluster.wait_for(ready.exists, f"start {start} of job {self.id}", lambda: self.log)

    def assert_ends(self, state: str, exit_code: str, restarts: int) -> None:
        fields = self.cluster.wait(self.id, lambda: self.log)
        found = (fields["JobState"], fields["ExitCode"], int(fields["Restarts"]))
        assert found == (state, exit_code, restarts), self.log


@pytest.fixture(scope="module")
def submit(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Submits slurm/train.sbatch, on two nodes, from a checkout in which pipeline/train.py is the stub."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "slurm", project / "slurm")
    (project / "pipeline").mkdir()
    shutil.copy(Path(__file__).with_name("stub_train.py"), project / "pipeline" / "train.py")

    # 20 minutes: the script asks for its signal 300 s before the end, and Slurm sends it a minute earlier if it likes
    def submit(name: str, plan: str, *options: str, **variables: str) -> Job:
        run = project / name
        run.mkdir()
        size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=20"]
        command = ["sbatch", "--parsable", *size, f"--output={run}/log", *options, project / "slurm" / "train.sbatch"]
        done = slurm.run(*command, PROJECT=project, RUN=run, OPTIONS=f"plan={plan}", **variables)
        return Job(done.stdout.strip(), run, slurm)

    return submit


@pytest.fixture(scope="module")
def jobs(submit: Callable[..., Job]) -> dict[str, Job]:
    """All that wait for nobody but Slurm, at once: what takes time is that a requeued job starts after five seconds."""
    # where neither the preemption nor the failure below reach it, since Slurm looks at time limits every 30 s
    apart = ["--partition=high", "--nodelist=127.0.0.1", "--nodes=1", "--ntasks-per-node=2"]
    return {
        "time limit": submit("limit", "wait+save+75,0", "--time=1", "--signal=B:USR1@50", *apart),
        "crash after a checkpoint": submit("again", "save+75,save+crash,0"),
        "crash before a checkpoint": submit("crash", "crash"),
        "mistake": submit("mistake", "save+2"),
        "no progress": submit("stuck", "75,75,75,75", MAX_STARTS_WITHOUT_PROGRESS="2"),
        "too many restarts": submit("restarts", "save+75,save+75,0", MAX_RESTARTS="1"),
    }


def test_a_crash_before_the_first_checkpoint_fails_and_names_the_rank(jobs: dict[str, Job]) -> None:
    job = jobs["crash before a checkpoint"]
    job.assert_ends("FAILED", "137:0", restarts=0)
    assert "task 1: Killed" in job.log
    assert "error: training ended with 137 before its first new checkpoint: not queued again" in job.log


def test_a_mistake_in_the_input_is_not_tried_again(jobs: dict[str, Job]) -> None:
    jobs["mistake"].assert_ends("FAILED", "2:0", restarts=0)


def test_a_saved_run_and_one_that_crashed_after_a_checkpoint_go_on(jobs: dict[str, Job]) -> None:
    job = jobs["crash after a checkpoint"]
    job.assert_ends("COMPLETED", "0:0", restarts=2)
    assert "training ended with 75 at step_0: queued again" in job.log
    assert "training ended with 137 at step_1: queued again" in job.log
    starts = [line.split("\t")[1:] for line in (job.run / "starts.tsv").read_text().splitlines()]
    assert starts == [[job.id, "0", "none"], [job.id, "1", "step_0"], [job.id, "2", "step_1"]]


def test_starts_that_come_to_nothing_end(jobs: dict[str, Job]) -> None:
    job = jobs["no progress"]
    job.assert_ends("FAILED", "1:0", restarts=2)
    assert "error: 2 starts in a row made no new checkpoint" in job.log


def test_restarts_are_bounded(jobs: dict[str, Job]) -> None:
    job = jobs["too many restarts"]
    job.assert_ends("FAILED", "75:0", restarts=1)
    assert "after MAX_RESTARTS=1 restarts" in job.log


def test_a_cancelled_run_saves_and_stays_cancelled(slurm: Cluster, submit: Callable[..., Job]) -> None:
    job = submit("cancelled", "wait+save+75,0")
    job.wait_until_ready()
    slurm.run("scancel", job.id)
    job.assert_ends("CANCELLED", "0:15", restarts=0)
    slurm.wait_for((job.run / "checkpoints" / "latest").exists, "the checkpoint", lambda: job.log)


def test_a_preempted_run_saves_and_goes_on(slurm: Cluster, submit: Callable[..., Job]) -> None:
    """One is told while training, one before it can listen: that one is killed by the signal, and queued again too."""
    ready, deaf = submit("preempted", "wait+save+75,0"), submit("deaf", "sleep,0")
    for job in (ready, deaf):
        job.wait_until_ready()
    # all of a node on which both run, and nothing else
    node = ["--nodelist=127.0.0.2", "--nodes=1", "--ntasks-per-node=16"]
    slurm.run("sbatch", "--partition=high", *node, "--output=/dev/null", "--wrap=true")
    for job in (ready, deaf):
        job.assert_ends("COMPLETED", "0:0", restarts=1)
    assert ready.saved == "step_0"
    assert "training ended with 138 at none: queued again" in deaf.log


def test_a_failed_node_is_replaced(slurm: Cluster, submit: Callable[..., Job]) -> None:
    job = submit("node", "save+sleep,0")
    job.wait_until_ready()
    slurm.fail_node("127.0.0.2")
    slurm.wait_for(lambda: slurm.fields(job.id)["Restarts"] == "1", "the job to be queued again", lambda: job.log)
    slurm.mend_node("127.0.0.2")
    job.assert_ends("COMPLETED", "0:0", restarts=1)


def test_the_time_limit_is_announced_and_the_run_goes_on(jobs: dict[str, Job]) -> None:
    job = jobs["time limit"]
    job.assert_ends("COMPLETED", "0:0", restarts=1)
    assert "asked to stop" in job.log
    assert job.saved == "step_0"
