"""Train the arms of a study and keep what they reached: `runs.jsonl`, one line for each finished run.

    benchmarks/study/prepare.sh DATA FOLDER                               # shards, evaluation sets, tokenizers
    python benchmarks/study/run_study.py time STUDY.yaml --data FOLDER --output OUT       # seconds of a step, alone
    python benchmarks/study/run_study.py train STUDY.yaml --data FOLDER --output OUT --lanes 4 --minutes 10
    python benchmarks/study/collect_study.py OUT…                         # -> benchmarks/results/study.json

`time` runs every arm by itself, again and again in turn, and has to come first: the runs of the view `time` are as long
as its ratios say. With several lanes the runs of `train` disturb each other's speed, never what they learn. Finished
runs are not repeated. On a machine without a GPU set DS_ACCELERATOR=cpu, and OMP_NUM_THREADS=1 for one lane per core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from lanes import Job, preload, run_jobs
from study_plan import BASELINE, Run, Study, merged, read_study, recipe_of

from pipeline import evaluate, train

_TIMED_STEPS, _UNTIMED_LINES = 40, 1


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one JSON object per line; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def beside(directory: Path, ending: str) -> Path:
    """A file next to a directory, called as it."""
    return directory.with_name(directory.name + ending)


def write_recipe(path: Path, fields: dict[str, Any]) -> Path:
    """A recipe file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


def time_arms(study: Study, data: Path, output: Path, rounds: int, workers: int, end_s: float) -> None:
    """Every arm alone for some steps, `rounds` times in turn; appends a line each to times.jsonl."""
    known = len(read_lines(output / "times.jsonl")) // len(study.arms)
    settings = {
        "data": {"workers": workers},
        "log": {"watch_steps": False},
        "evaluation": {"data": []},
        "train": {"max_steps": _TIMED_STEPS, "log_every_steps": 5, "save_every_steps": 10**6},
    }
    jobs = []
    for turn in range(known, known + rounds):
        for arm in study.arms:
            directory = output / "timed" / f"{arm.replace(' ', '_')}-{turn}"
            fields = merged(recipe_of(study, Run(arm, "samples", 0), 1.0, data, directory), settings)
            recipe = write_recipe(beside(directory, ".yaml"), fields)
            arguments = ("--recipe", str(recipe), "--resume", "never")
            jobs.append(Job(f"{arm}\t{directory}", ((train.main, arguments),), beside(directory, ".log")))

    def keep(job: Job, code: int) -> None:
        arm, directory = job.name.split("\t")
        lines = read_lines(Path(directory) / "metrics.jsonl")[_UNTIMED_LINES:]
        if code or not lines:
            print(f"{arm}: exit code {code}, see {job.log}", file=sys.stderr, flush=True)
            return
        figures = {
            "arm": arm,
            "s_per_step": statistics.median(line["seconds_per_step"] for line in lines),
            "data_wait_share": statistics.median(line["data_wait_share"] for line in lines),
            "tokens_per_pair": (lines[-1]["image_tokens"] + lines[-1]["text_tokens"]) / study.batch,
            "memory_peak_bytes": max(line["memory_peak_bytes"] or 0 for line in lines),
        }
        with (output / "times.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")
        print(json.dumps(figures), flush=True)

    run_jobs(jobs, 1, end_s, keep)


def relative_times(output: Path) -> dict[str, float]:
    """Median seconds of a step of each arm that was timed."""
    lines = read_lines(output / "times.jsonl")
    return {
        arm: statistics.median(line["s_per_step"] for line in lines if line["arm"] == arm)
        for arm in dict.fromkeys(line["arm"] for line in lines)
    }


def share_of(run: Run, times: dict[str, float]) -> float:
    """How many times the study's pairs a run sees."""
    return times[BASELINE] / times[run.arm] if run.view == "time" else 1.0


def _jobs(study: Study, data: Path, output: Path, workers: int) -> Iterator[Job]:
    times = relative_times(output)
    done = {line["name"] for line in read_lines(output / "runs.jsonl")}
    for run in study.runs():
        if run.name in done:
            continue
        if run.view == "time" and not {run.arm, BASELINE} <= times.keys():
            raise SystemExit(f"error: {run.arm} is not timed: `run_study.py time` comes first")
        directory = output / "runs" / run.name
        fields = merged(recipe_of(study, run, share_of(run, times), data, directory), {"data": {"workers": workers}})
        recipe = write_recipe(beside(directory, ".yaml"), fields)
        programs: list[Any] = [(train.main, ("--recipe", str(recipe)))]
        if study.probe:
            sets = [str(data / name) for name in study.probe]
            arguments = ("--checkpoint", str(directory), "--data", *sets, "--tasks", "linear_probe")
            options = ("--output", str(directory / "evaluation"), "--batch-size", "500")
            programs.append((evaluate.main, (*arguments, *options)))
        yield Job(run.name, tuple(programs), beside(directory, ".log"))


def outcome(study: Study, run: Run, directory: Path) -> dict[str, Any]:
    """What is kept of a finished run: its figures at every evaluation, tokens and pairs seen."""
    lines = read_lines(directory / "metrics.jsonl")
    curve, image_tokens, text_tokens, previous = [], 0.0, 0.0, 0
    for line in lines:
        steps, previous = line["step"] - previous, line["step"]
        image_tokens += steps * line["image_tokens"]
        text_tokens += steps * line["text_tokens"]
        found = {
            name: sum(line[key] for key in keys.split(" + ")) / len(keys.split(" + "))
            for name, keys in study.metrics.items()
            if keys.split(" + ")[0] in line
        }
        if found:
            curve.append(
                {"step": line["step"], "pairs": line["samples_seen"], "image_tokens": round(image_tokens)}
                | {"text_tokens": round(text_tokens), "loss": line["loss"], "mask_threshold": line["mask_threshold"]}
                | found
            )
    results = read_lines(directory / "evaluation" / "results.jsonl")
    probes = {f"{line['dataset']} linear probe": line["metrics"]["lp_acc1"] for line in results}
    return {
        "name": run.name,
        "arm": run.arm,
        "view": run.view,
        "seed": run.seed,
        "wall_time_s": lines[-1]["wall_time_s"],
        "curve": curve,
        "probes": probes,
    }


def train_arms(study: Study, data: Path, output: Path, lanes: int, workers: int, end_s: float) -> None:
    """All runs that are not finished, until the time is up."""
    runs = {run.name: run for run in study.runs()}

    def keep(job: Job, code: int) -> None:
        if code:
            print(f"{job.name}: exit code {code}, see {job.log}", file=sys.stderr, flush=True)
            return
        kept = outcome(study, runs[job.name], output / "runs" / job.name)
        with (output / "runs.jsonl").open("a") as file:
            file.write(json.dumps(kept) + "\n")
        last = {name: round(value, 4) for name, value in kept["curve"][-1].items() if name in study.metrics}
        print(f"{job.name}  {kept['wall_time_s']:.1f} s  {last} {kept['probes']}", flush=True)

    run_jobs(_jobs(study, data, output, workers), lanes, end_s, keep)


def main() -> None:
    """Time or train, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["time", "train"])
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.sh made")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time (train)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of a run")
    parser.add_argument("--rounds", type=int, default=1, help="how often each arm is timed (time)")
    parser.add_argument("--minutes", type=float, default=1e6, help="then end what is under way")
    options = parser.parse_args()
    end_s = time.monotonic() + 60 * options.minutes
    study = read_study(options.study)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "study.yaml").write_text(options.study.read_text())
    preload()
    if options.action == "time":
        time_arms(study, options.data, options.output, options.rounds, options.workers, end_s)
    else:
        train_arms(study, options.data, options.output, options.lanes, options.workers, end_s)


if __name__ == "__main__":
    main()
