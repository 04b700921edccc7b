"""From a url list to a table as jobs on two nodes, in chaos: the bits that the same programs give undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from forked_ranks import start_program
from slurm_cluster import Cluster
from small_web import Page, SmallWeb

from data_prep.__main__ import main as data_prep
from formats.files import sha256_of
from pipeline import evaluate, report, train
from pipeline.training.weights.run_weights import find_checkpoint

pytestmark = pytest.mark.slow

STEPS = 300  # a run of which something is left after three disturbances, however fast it is
OPTIONS = [
    *("model.name=ViT-test-8", "data.workers=1", "train.global_batch_size=16", "train.micro_batch_size=8"),
    *(f"train.max_steps={STEPS}", "train.save_every_steps=10", "train.log_every_steps=1"),
]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pictures on a web server, their url list, and evaluation sets."""
    folder = tmp_path_factory.mktemp("web")
    with SmallWeb() as server:
        size = ["--train", "240", "--validation", "100", "--size", "32"]
        assert data_prep(["synthetic", str(folder), *size, "--base-url", server.url("")]) == 0
        for path in (folder / "train").rglob("*.jpg"):
            server.pages[f"/{path.relative_to(folder)}"] = Page(path.read_bytes(), delay_s=0.02)
        yield folder


@dataclass(frozen=True)
class Chain:
    """The jobs that submit.sh has queued, by name, and the folder in which they work."""

    jobs: dict[str, str]
    folder: Path
    cluster: Cluster

    @property
    def step(self) -> int:
        """The last step that training has logged."""
        metrics = self.folder / "run" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    @property
    def starts(self) -> int:
        """How often training has begun."""
        starts = self.folder / "run" / "starts.tsv"
        return starts.read_text().count("\n") if starts.exists() else 0

    @property
    def checkpoint(self) -> str:
        """The newest one, if there is one."""
        latest = self.folder / "run" / "checkpoints" / "latest"
        return latest.read_text() if latest.exists() else ""

    def log(self, name: str) -> str:
        """What a job, or the tasks of an array, have printed."""
        logs = (self.folder / "logs").glob(f"{name}-{self.jobs[name]}*.log")
        return "".join(log.read_text() for log in logs)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """AssertionError with all logs if it never comes."""
        self.cluster.wait_for(condition, what, lambda: "\n".join(f"{name}:\n{self.log(name)}" for name in self.jobs))

    def ranks(self) -> list[int]:
        """Process ids of the ranks that train; loader processes have the same command line, and ranks as parents."""
        parents: dict[int, int] = {}
        for process in psutil.process_iter(["cmdline", "ppid"]):
            words = process.info["cmdline"] or [""]
            if f"train.output={self.folder}/run" in words and "python" in words[0]:
                parents[process.pid] = process.info["ppid"]
        return [rank for rank, parent in parents.items() if parent not in parents]

    def assert_completes(self, name: str) -> None:
        """Wait for a job."""
        self.wait_for(lambda: self.cluster.is_over(self.jobs[name]), f"{name} to end")
        assert self.cluster.state(self.jobs[name]) == "COMPLETED", f"{self.log(name)}\n{self.cluster.report()}"


def submit(slurm: Cluster, web: Path, folder: Path) -> Chain:
    """Queue the whole path."""
    stages = [
        {"ingest": {"sources": str(web / "train.tsv")}},
        {"download": {"resize-mode": "no", "samples-per-shard": 40, "allow-local": True, "processes": 1}},
        "verify",
        {"tokenizer": {"model-type": "bpe", "vocab-size": 600}},
    ]
    (folder / "build.yaml").write_text(json.dumps({"output": str(folder / "data"), "stages": stages}))
    done = slurm.run(
        ROOT / "slurm" / "submit.sh",
        CONFIG=folder / "build.yaml",
        DOWNLOAD_TASKS="2",
        SHARDS=folder / "data" / "shards",
        TOKENIZER=folder / "data" / "tokenizer.model",
        RECIPE="demo",
        OPTIONS=" ".join(OPTIONS),
        RUN=folder / "run",
        EVALUATION_SETS=f"{web}/eval/retrieval {web}/eval/composition",
        EVALUATION_TASKS="2",
        LOGS=folder / "logs",
        PREPARE_SBATCH="--cpus-per-task=1",
        TRAIN_SBATCH="--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0",
        EVALUATE_SBATCH="--cpus-per-task=1 --gpus-per-node=0",
    )
    return Chain(dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE)), folder, slurm)


class Chaos:
    """What happens to the jobs of a chain, at random, and is printed."""

    def __init__(self, chain: Chain, seed: int) -> None:
        print(f"seed {seed}")
        self._chain = chain
        self._slurm = chain.cluster
        self._random = random.Random(seed)
        self._start_s = time.monotonic()

    def disturb_array(self, name: str) -> None:
        """Queue one task of an array again while it runs."""
        task = f"{self._chain.jobs[name]}_{self._random.randrange(2)}"
        self._chain.wait_for(lambda: self._slurm.state(task) == "RUNNING" or self._slurm.is_over(task), f"task {task}")
        if self._slurm.is_over(task):  # the jobs behind it may be at work
            self._note(f"task {task} of {name} was faster")
        else:
            self._slurm.run("scontrol", "requeue", task)
            self._note(f"task {task} of {name} queued again")

    def disturb_training(self) -> None:
        """Preempt it, kill one of its ranks, queue it again: in any order, at any step."""
        events = [self._preempt, self._kill_a_rank, self._requeue]
        self._random.shuffle(events)
        for restarts, event in enumerate(events, start=1):
            # after a new checkpoint in each start: a crash before it would end the job
            step, checkpoint = self._chain.step + self._random.randrange(5, 25), self._chain.checkpoint
            self._wait_for_training(lambda step=step: self._chain.step >= step, f"step {step}")
            self._wait_for_training(lambda old=checkpoint: self._chain.checkpoint != old, "a checkpoint")
            ranks = self._chain.ranks()
            _send(ranks, signal.SIGSTOP)  # the run would soon be over
            self._note(f"step {self._chain.step}: {event.__name__}")
            event(ranks)
            self._wait_for_training(lambda starts=restarts + 1: self._chain.starts == starts, f"restart {restarts}")

    def _preempt(self, ranks: list[int]) -> None:
        self._slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        self._wait_for_training(lambda: "asked to stop" in self._chain.log("train"), "the signal")
        _send(ranks, signal.SIGCONT)

    def _kill_a_rank(self, ranks: list[int]) -> None:
        _send([self._random.choice(ranks)], signal.SIGKILL)
        _send(ranks, signal.SIGCONT)

    def _requeue(self, ranks: list[int]) -> None:
        self._slurm.run("scontrol", "requeue", self._chain.jobs["train"])
        _send(ranks, signal.SIGCONT)

    def _wait_for_training(self, condition: Callable[[], object], what: str) -> None:
        job = self._chain.jobs["train"]
        self._chain.wait_for(lambda: condition() or self._slurm.is_over(job), what)
        assert not self._slurm.is_over(job), f"no {what}: {self._chain.log('train')}\n{self._slurm.report()}"

    def _note(self, what: str) -> None:
        print(f"{time.monotonic() - self._start_s:5.1f} s  {what}")


def _send(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def run_undisturbed(web: Path, data: Path, folder: Path) -> None:
    """What the jobs do, on this machine and without Slurm."""
    run, results = folder / "run", folder / "run" / "evaluation"
    recipe = ["--recipe", "demo", f"data.train={data / 'shards'}", f"data.tokenizer={data / 'tokenizer.model'}"]
    sets = [str(web / "eval" / name) for name in ("retrieval", "composition")]
    for main, arguments, ranks in (
        (train.main, [*recipe, *OPTIONS, f"train.output={run}"], 2),
        (evaluate.main, ["--checkpoint", str(run), "--data", *sets, "--output", str(results)], 1),
        (report.main, [str(run), "--output", str(run / "report")], 1),
    ):
        program = start_program(main, arguments, ranks, folder / "output")
        assert program.wait() == [0] * ranks, program.output()


def outcome(run: Path) -> dict[str, object]:
    """All of a run that must not depend on what happened to it."""
    results = [json.loads(line) for line in (run / "evaluation" / "results.jsonl").read_text().splitlines()]
    sections = re.split("^## ", (run / "report" / "report.md").read_text(), flags=re.MULTILINE)
    return {
        "weights": sha256_of(find_checkpoint(run) / "model.safetensors"),
        "losses": [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()],
        "metrics": {result["dataset"]: result["metrics"] for result in results},
        # other tables say how long training took, too
        "tables": [section for section in sections if section.startswith("All figures by dataset")],
    }


def captions_in(shards: Path) -> list[str]:
    """Sorted: a download leaves pairs in the order in which they arrive."""
    found = []
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".txt")]
            found += [file.read().decode() for file in files if file is not None]
    return sorted(found)


def test_chaos_changes_no_bit(slurm: Cluster, web: Path, tmp_path: Path) -> None:
    chain = submit(slurm, web, tmp_path)
    chaos = Chaos(chain, seed=random.randrange(10**6))
    chaos.disturb_array("download")
    chain.assert_completes("prepare")
    listed = [line.partition("\t")[0] for line in (web / "train.tsv").read_text().splitlines()]
    assert captions_in(tmp_path / "data" / "shards") == sorted(listed)

    chaos.disturb_training()
    chain.assert_completes("train")
    chaos.disturb_array("evaluate")
    for name in ("evaluate", "collect"):
        chain.assert_completes(name)
    assert slurm.fields(chain.jobs["train"])["Restarts"] == "3"

    run_undisturbed(web, tmp_path / "data", tmp_path / "undisturbed")
    found = outcome(tmp_path / "run")
    assert len(found["losses"]) == STEPS
    assert len(found["tables"]) == 1
    assert found == outcome(tmp_path / "undisturbed" / "run")
