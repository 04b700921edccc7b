"""The chain of jobs: what is submitted, what is refused, and what becomes of it when a job fails."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_cluster import Cluster

SCRIPTS = sorted(
    [
        ROOT / ".ci/run",
        *(path for folder in ("slurm", "examples", "benchmarks") for path in (ROOT / folder).glob("*.s[hb]*")),
    ]
)
CPU_SIZES = {
    "PREPARE_SBATCH": "--cpus-per-task=1",
    "TRAIN_SBATCH": "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0",
    "EVALUATE_SBATCH": "--cpus-per-task=1 --gpus-per-node=0",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("no shellcheck: it is among the development dependencies")
    done = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs submit.sh of a checkout whose data-prep fails; its folder is tmp_path."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    command = tmp_path / "venv" / "bin" / "data-prep"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\necho no such list >&2\nexit 2\n")
    command.chmod(0o755)
    settings = {**CPU_SIZES, "VENV": str(tmp_path / "venv"), "EVALUATION_SETS": "a b", "DOWNLOAD_TASKS": "3"}

    def submit(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return slurm.run(tmp_path / "slurm" / "submit.sh", *arguments, check=False, **{**settings, **variables})

    return submit


def job_ids(output: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))


def test_a_dry_run_submits_nothing_and_asks_slurm(slurm: Cluster, submit: Callable) -> None:
    done = submit("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "sbatch" in line]
    assert [re.search(r"--job-name=(\w+)", line)[1] for line in lines] == [
        *("ingest", "download", "prepare", "train", "evaluate", "collect")
    ]
    assert "--array=0-2" in lines[1]
    assert "--dependency=afterok:<train> --kill-on-invalid-dep=yes" in lines[4]
    assert done.stderr.count("to start at") == 6
    assert slurm.run("squeue", "--noheader").stdout == ""

    balanced = submit(
        "--dry-run", "balance", "train", EMBEDDER="runs/base", BALANCE="/scratch/b", OPTIONS="data.workers=4"
    )
    assert balanced.returncode == 0, balanced.stderr
    assert re.findall(r"--job-name=(\w+)", balanced.stdout) == ["embed", "clusters", "balance", "train"]
    assert 'OPTIONS="data.workers=4 data.balance=/scratch/b/rates" sbatch' in balanced.stdout

    too_large = submit("--dry-run", "train", TRAIN_SBATCH="--nodes=40 --gpus-per-node=0")
    assert too_large.returncode != 0
    assert "not available" in too_large.stderr


def test_wrong_arguments_are_one_line(submit: Callable) -> None:
    for arguments, variables, message in (
        (["trian"], {}, "error: unknown stage 'trian'"),
        (["balance", "train"], {}, "error: nothing to embed with: set EMBEDDER"),
        ([], {"EVALUATION_SETS": ""}, "error: nothing to evaluate: set EVALUATION_SETS"),
    ):
        done = submit(*arguments, **variables)
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_what_depends_on_a_failed_job_is_cancelled(slurm: Cluster, submit: Callable, tmp_path: Path) -> None:
    done = submit()
    assert done.returncode == 0, done.stderr
    jobs = job_ids(done.stdout)
    states = {name: slurm.wait(job)["JobState"] for name, job in jobs.items()}
    assert states == {"ingest": "FAILED"} | dict.fromkeys(
        ["download", "prepare", "train", "evaluate", "collect"], "CANCELLED"
    )
    assert f"cancel:   scancel {' '.join(jobs.values())}" in done.stdout
    assert "no such list" in (tmp_path / "logs" / f"ingest-{jobs['ingest']}.log").read_text()


def test_a_refused_job_takes_back_those_before_it(slurm: Cluster, submit: Callable) -> None:
    done = submit(TRAIN_SBATCH="--partition=absent")
    assert done.returncode != 0
    assert "error: a job was refused; those before it are cancelled" in done.stderr
    slurm.wait_for(lambda: slurm.run("squeue", "--noheader").stdout == "", "an empty queue")
    assert all(slurm.state(job) in {"CANCELLED", "FAILED"} for job in job_ids(done.stdout).values())
