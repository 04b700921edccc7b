"""Faults injected into training at random moments, and what became of the runs.

    python benchmarks/faults.py [FAULT …] [--times N] [--seed N]

Each trial is a run of 40 steps on two CPU ranks with a checkpoint every five (fault_trials.py), disturbed once and then
started again with the same command until it is finished. Writes results/faults.json, and the table in
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fault_kinds as kinds
import fault_slurm as jobs
from fault_trials import RANK_ENVIRONMENT, ROOT, STEPS, Laboratory, Run, Trial, files_of
from integration import faulty_train
from record import record
from slurm_cluster import Cluster
from small_slurm import running_cluster

PAGE = ROOT / "docs" / "reliability.md"
TABLE_BEGINS, TABLE_ENDS = "<!-- faults.json -->\n", "<!-- end of faults.json -->\n"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, in words; how often it is tried; one trial of it."""

    name: str
    what: str
    times: int
    trial: Callable[[Laboratory, Run], Trial]


def forked(disturb: Callable[[Run], None], *options: str) -> Callable[[Laboratory, Run], Trial]:
    """A trial that disturbs forked ranks."""
    return lambda laboratory, run: laboratory.forked_trial(run, disturb, *options)


def launched(disturb: Callable[[Run], None], *launcher: str) -> Callable[[Laboratory, Run], Trial]:
    """A trial that disturbs a launcher."""

    def trial(laboratory: Laboratory, run: Run) -> Trial:
        return laboratory.launched_trial(run, disturb, [*launcher, f"--master_port={free_port()}"])

    return trial


def full_disk(laboratory: Laboratory, run: Run) -> Trial:
    """The run directory is a small disk that fills up."""
    with kinds.small_disk(run.directory):
        return laboratory.forked_trial(run, kinds.fill_the_disk, mend=kinds.empty_the_disk)


def vanishing_shard(laboratory: Laboratory, run: Run) -> Trial:
    """The run reads its own copy of the shards."""
    shards = kinds.OwnShards(laboratory.shards, run)
    return laboratory.forked_trial(run, shards.hide_one, f"data.train={shards.directory}", mend=shards.give_back)


def on_slurm(disturb: Callable[[jobs.Job], None]) -> Callable[[Laboratory, Run], Trial]:
    """A trial that disturbs a job on a cluster of its own."""

    def trial(laboratory: Laboratory, run: Run) -> Trial:
        directory = run.directory.with_name(f"{run.directory.name}_slurm")
        with running_cluster(directory):
            environment = RANK_ENVIRONMENT | {"VENV": sys.prefix}
            return jobs.slurm_trial(laboratory, Cluster(directory, ROOT, environment), run, disturb)

    return trial


def nan_in_one_rank(laboratory: Laboratory, run: Run) -> Trial:
    """The update is left out on both ranks, whichever of them it was: twins, each with the other rank's NaN, agree."""
    step, codes, files = run.random.randrange(STEPS), [], []
    for rank in range(2):
        twin = Run(run.directory.with_name(f"{run.directory.name}_rank{rank}"), run.random)
        faults = json.dumps({"nan": [[step, rank]]})
        codes += laboratory.start(twin, "faults.on_non_finite=skip", main=faulty_train.main, FAULTS=faults).wait()
        files.append(files_of(twin.checkpoint(STEPS)))
    return Trial(step, tuple(codes), 1, files[0] == files[1])


def free_port() -> int:
    """For a launcher."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_accelerators=2")
TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2")
FAULTS = [
    Fault("kill_all", "SIGKILL of all ranks", 20, forked(kinds.kill_all_ranks)),
    Fault("kill_one", "SIGKILL of one rank", 20, forked(kinds.kill_one_rank)),
    Fault(
        "kill_saving", "SIGKILL of one rank or both while a checkpoint is written", 20, forked(kinds.kill_while_saving)
    ),
    Fault("term_one", "SIGTERM to one rank", 20, forked(kinds.terminate_one_rank)),
    Fault(
        "damage",
        "a file of the newest checkpoint cut, missing, or a bit flipped",
        20,
        forked(kinds.damage_the_newest_checkpoint),
    ),
    Fault("disk_full", "the disk full, later emptied", 10, full_disk),
    Fault("kill_worker", "SIGKILL of a loader worker", 10, forked(kinds.kill_a_loader_worker, "data.workers=1")),
    Fault("shard", "a shard vanishes, later comes back", 10, vanishing_shard),
    Fault("nan", "NaN in the features of one rank: a run in which the other one had it", 20, nan_in_one_rank),
    Fault(
        "deepspeed_term", "SIGTERM to the `deepspeed` launcher", 3, launched(kinds.terminate_the_launcher, *DEEPSPEED)
    ),
    Fault("deepspeed_kill", "SIGKILL of the `deepspeed` launcher", 3, launched(kinds.kill_the_launcher, *DEEPSPEED)),
    Fault("torchrun_term", "SIGTERM to `torchrun`", 3, launched(kinds.terminate_the_launcher, *TORCHRUN)),
    Fault("torchrun_kill", "SIGKILL of `torchrun`", 3, launched(kinds.kill_the_launcher, *TORCHRUN)),
    Fault("slurm_preempt", "Slurm: preemption", 3, on_slurm(jobs.preempt)),
    Fault("slurm_limit", "Slurm: the time limit", 3, on_slurm(jobs.reach_the_time_limit)),
    Fault("slurm_requeue", "Slurm: `scontrol requeue`", 3, on_slurm(jobs.requeue)),
    Fault("slurm_cancel", "Slurm: `scancel`, submitted again", 3, on_slurm(jobs.cancel_and_submit_again)),
    Fault("slurm_rank", "Slurm: SIGKILL of one rank", 3, on_slurm(jobs.kill_a_rank)),
    Fault("slurm_node", "Slurm: a node and all on it gone", 3, on_slurm(jobs.fail_a_node)),
]


def summary(fault: Fault, trials: Sequence[Trial]) -> dict[str, Any]:
    """The figures of one fault."""
    codes = Counter(" ".join(map(str, trial.exit_codes)) for trial in trials)
    notes = Counter(note for trial in trials for note in trial.notes)
    return {
        "what": fault.what,
        "injected": len(trials),
        "bit_identical": sum(trial.identical for trial in trials),
        "starts": sum(trial.starts for trial in trials) / len(trials),
        "exit_codes": dict(codes.most_common()),
        "notes": dict(notes.most_common()),
        "steps": sorted(trial.step for trial in trials),
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    """A row for each fault, in the order of FAULTS."""
    lines = [
        "| fault | the disturbed start ends with | starts until the end | same bits | `faults.py …` |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        if fault.name not in figures:
            continue
        row = figures[fault.name]
        codes = ", ".join(f"{codes} ({count} x)" for codes, count in row["exit_codes"].items() if codes) or "–"
        notes = ", ".join(f"{note} ({count} x)" for note, count in row["notes"].items())
        what = f"{row['what']}: {notes}" if notes else row["what"]
        same = f"{row['bit_identical']} of {row['injected']}"
        lines.append(f"| {what} | {codes} | {row['starts']:.1f} | {same} | `{fault.name}` |")
    return "\n".join(lines) + "\n"


def write_table(figures: dict[str, dict[str, Any]]) -> None:
    """Replace the table of docs/reliability.md."""
    before, _, rest = PAGE.read_text().partition(TABLE_BEGINS)
    _, _, after = rest.partition(TABLE_ENDS)
    PAGE.write_text(f"{before}{TABLE_BEGINS}{table(figures)}{TABLE_ENDS}{after}")


def main() -> int:
    """Try each fault as often as it says; returns 1 if a run did not end with the bits of the undisturbed one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="FAULT", help=", ".join(fault.name for fault in FAULTS))
    parser.add_argument("--times", type=int, help="trials of each, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.names or fault.name in options.names]
    command = f"python benchmarks/faults.py {' '.join(options.names)} --seed {options.seed}".replace("  ", " ")
    all_identical = True
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        laboratory = Laboratory(Path(folder))
        for fault in chosen:
            trials = []
            for number in range(options.times or fault.times):
                run = Run(Path(folder) / f"{fault.name}_{number}", Random(f"{options.seed} {fault.name} {number}"))
                trials.append(fault.trial(laboratory, run))
                print(f"{fault.name} {number}: {trials[-1]}", flush=True)
            all_identical &= all(trial.identical for trial in trials)
            path = record("faults", summary(fault, trials), command, repeats=len(trials), part=fault.name)
            write_table(json.loads(path.read_text())["figures"])
    return 0 if all_identical else 1


if __name__ == "__main__":
    sys.exit(main())
