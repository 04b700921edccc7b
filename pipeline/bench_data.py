"""Say how fast a recipe's data can be read, what binds, and whether it is enough for a step."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from formats.programs import run
from pipeline.data.loader_speed import LoaderSpeed, measure_loader
from pipeline.data.training_data import read_training_data
from pipeline.recipe_files import load_recipe


def main(argv: Sequence[str]) -> int:
    """Measure and print. Raises UserError as training would."""
    options = _parser().parse_intermixed_args(argv)  # overrides may stand among the options
    _, recipe = load_recipe(options.recipe, options.overrides).by_stage()[0]
    torch.set_num_threads(1)  # as in a worker
    data = read_training_data(recipe.data)
    if not options.json:
        print(f"{data.num_samples:,} samples in {len(data.shards):,} shards, {options.seconds:g} s each", flush=True)
    speed = measure_loader(recipe, data, options.seconds)
    if options.json:
        print(json.dumps(_report(speed), indent=2))
    else:
        print("\n".join([*_table(speed), *_verdict(speed, options.samples_per_s)]))
    return 0


def _report(speed: LoaderSpeed) -> dict[str, Any]:
    return {
        "samples_measured": speed.num_samples,
        "open_s": speed.open_s,
        "us_per_sample": {part: seconds * 1e6 for part, seconds in speed.seconds.items()},
        "samples_per_s_per_core": 1 / speed.sample_s,
        "workers": speed.workers,
        "samples_per_s": speed.samples_per_s,
        "binds": speed.binds,
    }


def _table(speed: LoaderSpeed) -> list[str]:
    rows = [f"{'on one core':<12}{'us/sample':>12}{'samples/s':>12}{'share':>8}"]
    for part, seconds in [*speed.seconds.items(), ("all", speed.sample_s)]:
        rows.append(f"{part:<12}{seconds * 1e6:>12,.0f}{1 / seconds:>12,.0f}{seconds / speed.sample_s:>8.0%}")
    return rows


def _verdict(speed: LoaderSpeed, needed: float | None) -> list[str]:
    lines = [
        f"opening the first shards, fetched and indexed where they were not: {speed.open_s:.2f} s",
        f"the loader with data.workers={speed.workers}: {speed.samples_per_s:,.0f} samples/s, bound by {speed.binds}",
    ]
    if needed is not None:
        share = speed.samples_per_s / needed
        enough = "enough" if share > 1 else "too slow: the step would wait"
        workers = speed.workers_for(needed)
        lines.append(f"a rank takes {needed:,.0f} samples/s: {enough}; {workers} workers with a core each would do")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-data",
        description="Measure a recipe's data on this machine: reading, decoding, augmenting, tokenising and collating "
        "on one core, then the whole loader with the recipe's workers; of a recipe with stages, the first.",
        epilog="example: bench-data --recipe base data.train=shards data.workers=8 --samples-per-s 1500",
    )
    parser.add_argument("--recipe", required=True, help="a recipe's name, or a YAML file such as RUN/recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that override the recipe")
    parser.add_argument("--samples-per-s", type=float, metavar="N", help="what the step of one rank takes")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each part (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print figures instead of a table")
    return parser


def command() -> NoReturn:
    """The console script."""
    run(main)


if __name__ == "__main__":
    command()
