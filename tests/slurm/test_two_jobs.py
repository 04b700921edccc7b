"""Two jobs on two nodes and one run directory; and a job that is queued again goes on with its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_cluster import Cluster

from formats.owners import OWNER

pytestmark = pytest.mark.slow


def submit(slurm: Cluster, folder: Path, node: str, shards: Path, tokenizer_file: Path) -> str:
    options = [
        *("model.name=ViT-test-8", "data.workers=0", "train.global_batch_size=16", "train.micro_batch_size=16"),
        *("train.max_steps=100000", "train.save_every_steps=5", "train.log_every_steps=1", "optimizer.warmup_steps=2"),
    ]
    size = ["--nodes=1", f"--nodelist={node}", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
    command = ["sbatch", "--parsable", *size, f"--output={folder}/log-%j", ROOT / "slurm" / "train.sbatch"]
    variables = {"RUN": folder / "run", "SHARDS": shards, "TOKENIZER": tokenizer_file, "RECIPE": "demo"}
    return slurm.run(*command, PROJECT=ROOT, OPTIONS=" ".join(options), **variables).stdout.strip()


def test_the_second_job_is_told_who_and_the_first_goes_on(
    slurm: Cluster, shards: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"

    def logs() -> str:
        return "\n".join(log.read_text() for log in tmp_path.glob("log-*"))

    first = submit(slurm, tmp_path, "127.0.0.1", shards, tokenizer_file)
    slurm.wait_for(lambda: metrics.exists() and metrics.stat().st_size, "the first steps", logs)
    second = submit(slurm, tmp_path, "127.0.0.2", shards, tokenizer_file)
    fields = slurm.wait(second, logs)
    log = (tmp_path / f"log-{second}").read_text()
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0"), log
    assert f"run is being trained by process {json.loads((tmp_path / 'run' / OWNER).read_text())['pid']}" in log
    assert f"on 127.0.0.1, job {first}, since" in log

    assert slurm.state(first) == "RUNNING"
    slurm.run("scontrol", "requeue", first)
    resumed = f"resuming from {tmp_path}/run/checkpoints/step_"
    slurm.wait_for(lambda: resumed in logs(), "the job to go on", logs)
    owner = json.loads((tmp_path / "run" / OWNER).read_text())
    assert (owner["job"], owner["restart"]) == (first, 1)
    slurm.run("scancel", first)
    slurm.wait(first, logs)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
