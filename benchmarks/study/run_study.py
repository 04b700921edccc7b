"""Train the arms of a study and keep what they reached: `runs.jsonl`, one line for each finished run.

    benchmarks/study/prepare.sh DATA FOLDER                               # shards, evaluation sets, tokenizers
    python benchmarks/study/run_study.py time STUDY.yaml --data FOLDER --output OUT       # seconds of a step, alone
    python benchmarks/study/run_study.py train STUDY.yaml… --data FOLDER --output OUT --lanes 4 --minutes 10
    python benchmarks/study/run_study.py probe STUDY.yaml --data FOLDER --output OUT      # of the final weights
    python benchmarks/study/collect_study.py OUT/NAME…                    # -> benchmarks/results/study.json

What a study gives is in OUT/NAME, NAME that of its file. `time` runs every arm by itself, again and again in turn, and
has to come first: the runs of the view `time` are as long as its ratios say. With `--workers 0` it counts the seconds
that a core works on steps, whatever else the machine does, and leaves out those of the loader, which has a process of
its own elsewhere. With several lanes the runs of `train`
disturb each other's speed, never what they learn. Finished runs are not repeated: the same command goes on. On a
machine without a GPU set DS_ACCELERATOR=cpu, and OMP_NUM_THREADS=1 for one lane per core.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from experiments import trying
from lanes import Job, preload, run_jobs
from study_plan import BASELINE, Run, Study, merged, read_study, recipe_of

from pipeline import evaluate
from pipeline.planning.plan_tables import plan_warnings
from pipeline.ranks import Ranks, init_ranks
from pipeline.recipe_files import load_recipe
from pipeline.training import training_run

_TIMED_STEPS, _UNTIMED_STEPS = 20, 4


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one JSON object per line; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_job(name: str, directory: Path, fields: dict[str, Any], experiment: str | None = None) -> Job:
    """A recipe's file and a log beside its run directory."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    recipe = directory.with_name(f"{directory.name}.yaml")
    recipe.write_text(yaml.safe_dump(fields, sort_keys=False))
    return Job(name, recipe, directory.with_name(f"{directory.name}.log"), experiment)


@functools.cache
def _ranks() -> Ranks:
    """A world of one for all runs of a process."""
    return init_ranks()


def train(job: Job) -> None:
    """What `pipeline/train.py` does, without a start of its own."""
    with trying(job.experiment):
        code = training_run.train(load_recipe(str(job.recipe), []), _ranks(), plan_warnings)
    if code == training_run.EXIT_INTERRUPTED:
        raise SystemExit(code)  # asked to stop, and saved: the lane stops too, and the same command goes on
    if code:
        raise RuntimeError(f"exit code {code}")


def train_by_core_seconds(job: Job) -> None:
    """`train` whose seconds are those that a core worked, of one thread and a loader within: others are not counted."""
    core = SimpleNamespace(perf_counter=time.process_time)
    with (
        mock.patch("pipeline.training.observing.metrics.time", core),
        mock.patch("pipeline.training.trainer.time", core),
    ):
        train(job)


def time_arms(study: Study, data: Path, output: Path, rounds: int, workers: int, end_s: float) -> None:
    """Every arm of a view alone for some steps, `rounds` times in turn; appends a line each to times.jsonl."""
    known = len(read_lines(output / "times.jsonl"))
    settings = {
        "data": {"workers": workers},
        "log": {"watch_steps": False},
        "evaluation": {"data": []},
        "train": {"max_steps": _TIMED_STEPS, "log_every_steps": 1, "save_every_steps": 10**6},
    }
    jobs = []
    for turn in range(rounds):
        for arm in study.timed_arms():
            directory = output / "timed" / f"{arm.replace(' ', '_')}-{known}-{turn}"
            fields = merged(recipe_of(study, Run(arm, "samples", 0), 1.0, data, directory), settings)
            if shares := study.arms[arm].concept_stages_at:  # what counts has all of them, in these shares
                counted = _TIMED_STEPS - _UNTIMED_STEPS
                boundaries = [(_UNTIMED_STEPS + round(share * counted)) * study.batch for share in shares]
                fields = merged(fields, {"concepts": {"boundaries": boundaries}})
            jobs.append(write_job(arm, directory, fields, study.arms[arm].experiment))

    def keep(job: Job, is_well: bool) -> None:
        if not is_well:
            print(f"{job.name} failed, see {job.log}", file=sys.stderr, flush=True)
            return
        lines = read_lines(job.log.with_suffix("") / "metrics.jsonl")[_UNTIMED_STEPS:]
        figures = {
            "arm": job.name,
            "s_per_step": [round(_seconds(line, is_alone=workers > 0), 4) for line in lines],
            "data_wait_share": statistics.median(line["data_wait_share"] for line in lines),
            "tokens_per_pair": (lines[-1]["image_tokens"] + lines[-1]["text_tokens"]) / study.batch,
            "memory_peak_bytes": max(line["memory_peak_bytes"] or 0 for line in lines),
        }
        with (output / "times.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")
        print(json.dumps(figures), flush=True)

    run_jobs(train_by_core_seconds if workers == 0 else train, jobs, 1, end_s, keep)


def _seconds(line: dict[str, Any], is_alone: bool) -> float:
    """Of a step, without the loader's where that works in the same process."""
    seconds: float = line["seconds_per_step"]
    return seconds if is_alone else seconds * (1 - line["data_wait_share"])


def step_times(study: Study, output: Path) -> dict[str, float]:
    """Seconds of a step of each arm, alone on a core: of each step the least of the rounds, since others only ever add
    to it, and of those the mean, since a ratio that falls is timed as it falls.
    """
    lines = read_lines((output.with_name(study.timed_as) if study.timed_as else output) / "times.jsonl")
    timed = {
        arm: statistics.mean(map(min, zip(*(line["s_per_step"] for line in lines if line["arm"] == arm), strict=True)))
        for arm in dict.fromkeys(line["arm"] for line in lines)
    }
    return {arm: step_s for arm in study.arms if (step_s := study.step_s(arm, timed)) is not None}


def _jobs(study: Study, data: Path, output: Path, workers: int) -> list[Job]:
    times = step_times(study, output)
    done = {line["name"] for line in read_lines(output / "runs.jsonl")}
    jobs = []
    for run in study.runs():
        if run.name in done:
            continue
        share = 1.0
        if run.view == "time":
            if not {run.arm, BASELINE} <= times.keys():
                raise SystemExit(f"error: {run.arm} is not timed: `run_study.py time` comes first")
            share = times[BASELINE] / times[run.arm]
        directory = output / "runs" / run.name
        fields = merged(recipe_of(study, run, share, data, directory), {"data": {"workers": workers}})
        jobs.append(write_job(f"{output.name}/{run.name}", directory, fields, study.arms[run.arm].experiment))
    return jobs


def outcome(study: Study, run: Run, directory: Path) -> dict[str, Any]:
    """What is kept of a finished run: its figures at every evaluation, with the pairs and tokens seen until then."""
    curve, tokens, step = [], {"image_tokens": 0.0, "text_tokens": 0.0}, 0
    last: dict[str, float] = {}
    for line in read_lines(directory / "metrics.jsonl"):
        for name in tokens:
            tokens[name] += (line["step"] - step) * line[name]
        step = line["step"]
        last |= {name: line[key] for name, key in study.last.items() if key in line}
        found = {name: _mean_of(line, keys.split(" + ")) for name, keys in study.metrics.items()}
        if None not in found.values():
            seen = {"step": step, "pairs": line["samples_seen"], **{name: round(n) for name, n in tokens.items()}}
            curve.append(seen | {name: line[name] for name in ("loss", "mask_threshold", "wall_time_s")} | found)
    return {"name": run.name, "arm": run.arm, "view": run.view, "seed": run.seed, "curve": curve, "last": last}


def _mean_of(line: dict[str, Any], keys: list[str]) -> float | None:
    return statistics.mean(line[key] for key in keys) if all(key in line for key in keys) else None


def train_arms(studies: Mapping[Path, Study], data: Path, lanes: int, workers: int, end_s: float) -> None:
    """All runs of studies, by their folders, that are not finished, studies in turn, until the time is up."""
    runs = {f"{folder.name}/{run.name}": (study, run) for folder, study in studies.items() for run in study.runs()}

    def keep(job: Job, is_well: bool) -> None:
        if not is_well:
            print(f"{job.name} failed, see {job.log}", file=sys.stderr, flush=True)
            return
        folder = job.log.parents[1]
        study, run = runs[job.name]
        kept = outcome(study, run, folder / "runs" / run.name)
        with (folder / "runs.jsonl").open("a") as file:
            file.write(json.dumps(kept) + "\n")
        last = kept["curve"][-1]
        figures = "  ".join(f"{name} {last[name]:.4f}" for name in study.metrics)
        print(f"{job.name}  {last['wall_time_s']:.1f} s  {figures}", flush=True)

    turns = itertools.zip_longest(*(_jobs(study, data, folder, workers) for folder, study in studies.items()))
    run_jobs(train, [job for turn in turns for job in turn if job], lanes, end_s, keep)


def probe_arms(study: Study, data: Path, output: Path, arms: list[str]) -> None:
    """A linear probe of the final weights of all finished runs at equal samples of these arms."""
    finished = [line for line in read_lines(output / "runs.jsonl") if line["view"] == "samples"]
    names = [line["name"] for line in finished if line["arm"] in (arms or study.arms)]
    sets = (str(data / name) for name in study.evaluation)
    models = (str(output / "runs" / name) for name in names)
    options = ("--tasks", "linear_probe", "--output", str(output / "probes"), "--batch-size", "500")
    evaluate.main(["--checkpoint", *models, "--data", *sets, *options])


def main() -> None:
    """Time, train or probe, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["time", "train", "probe"])
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.sh made")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time (train)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of a run")
    parser.add_argument("--rounds", type=int, default=1, help="how often each arm is timed (time)")
    parser.add_argument("--arms", nargs="+", default=[], help="only these (probe)")
    parser.add_argument("--minutes", type=float, default=1e6, help="then end what is under way")
    options = parser.parse_args()
    end_s = time.monotonic() + 60 * options.minutes
    studies = {options.output / path.stem: read_study(path) for path in options.studies}
    for folder, study in studies.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.yaml").write_text(study.to_yaml())
    preload()
    if options.action == "train":
        train_arms(studies, options.data, options.lanes, options.workers, end_s)
    for folder, study in studies.items():
        if options.action == "time":
            time_arms(study, options.data, folder, options.rounds, options.workers, end_s)
        elif options.action == "probe":
            probe_arms(study, options.data, folder, options.arms)


if __name__ == "__main__":
    main()
