"""Say how fast a recipe's data can be read, what binds, and whether it is enough for a step.

What is timed is the loader itself, under Python's profiler: no part of it is repeated here.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import cProfile
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from formats.programs import positive, run
from pipeline.data.captions import load_tokenizer
from pipeline.data.curriculum import read_curriculum
from pipeline.data.data_loader import (
    BATCHES_AHEAD,
    CaptionSet,
    MicroBatches,
    SampleStream,
    TrainingSet,
    collate,
    make_loader,
)
from pipeline.data.image_transform import decode_image, random_resized_crop
from pipeline.data.masked_words import CaptionMasker
from pipeline.data.sample_order import BatchPlan, MixedOrder
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import OpenShard, ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import TrainingData, read_training_data
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe

# Below this share of what its workers could do by themselves, something else holds a loader up.
_UNHINDERED = 0.75


@dataclass(frozen=True)
class LoaderSpeed:
    """Seconds a sample of each part on one core, of `num_samples`; and the loader's rate with the recipe's workers.

    open_s: until the shards of those samples were open, fetched and indexed where they were not
    """

    num_samples: int
    open_s: float
    seconds: dict[str, float]
    workers: int
    samples_per_s: float

    @property
    def sample_s(self) -> float:
        """What one sample costs a core."""
        return sum(self.seconds.values())

    @property
    def binds(self) -> str:
        """The part that takes most, or what keeps the workers from their work."""
        cores = len(os.sched_getaffinity(0))
        if self.samples_per_s < _UNHINDERED * min(max(1, self.workers), cores) / self.sample_s:
            return "handing batches over, or what else these cores do"
        return "the number of cores" if self.workers > cores else max(self.seconds, key=self.seconds.__getitem__)

    def workers_for(self, samples_per_s: float) -> int:
        """Workers that make so many samples, each with a core of its own."""
        return math.ceil(samples_per_s * self.sample_s)


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


def measure_loader(recipe: Recipe, data: TrainingData, seconds: float) -> LoaderSpeed:
    """Read the first samples of a run for so long, part by part in this process, then as the run would.

    Raises UserError as training would.
    """
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.context_length)
    captions = TextMasker(tokenizer, recipe.text_masking)
    image_size = recipe.clip_config(tokenizer.encoder.vocab_size, tokenizer.encoder.end_token_id).vision.image_size

    curriculum = read_curriculum(recipe.concepts)

    def dataset() -> SampleStream:
        """As it is at a run's start: no shard is open."""
        order, reader = data.order(recipe.data, recipe.train.seed), ShardReader(data.shards, make_cache(recipe.data))
        if recipe.masks_words and curriculum is not None:
            masker = CaptionMasker(tokenizer, curriculum, recipe.concepts.curriculum, recipe.longest_caption)
            return CaptionSet(reader, order, recipe.train.seed, masker)
        return TrainingSet(reader, order, recipe.train.seed, captions, image_size, recipe.data.crop_min_area)

    micro = recipe.train.micro_batch_size
    num_samples, parts_s = _measure_parts(dataset(), micro, seconds)
    open_s = parts_s.pop("open")
    per_sample = {part: total_s / num_samples for part, total_s in parts_s.items()}
    places = MicroBatches(BatchPlan(data.num_samples, micro, micro, world_size=1), 0, 0, 1 << 40)
    rate = _measure_rate(dataset(), places, micro, recipe.data.workers, seconds)
    return LoaderSpeed(num_samples, open_s, per_sample, recipe.data.workers, rate)


def _measure_parts(dataset: SampleStream, micro_batch_size: int, seconds: float) -> tuple[int, dict[str, float]]:
    """(samples, seconds of each part) of batches that are made here until the time is up."""
    parts: dict[str, tuple[Callable[..., Any], ...]] = {
        "open": (ShardReader.open,),
        "read": (MixedOrder.locate, OpenShard.read, OpenShard.read_caption),
        "decode": (decode_image,),
        "augment": (random_resized_crop,),
        "tokenise": (TextMasker.encode, CaptionMasker.mask),
        "collate": (collate,),
    }
    num_samples, positions = 0, itertools.count()
    deadline_s = time.perf_counter() + seconds
    with cProfile.Profile() as profile:
        while time.perf_counter() < deadline_s:
            samples = []
            for position in itertools.islice(positions, micro_batch_size):
                samples.append(dataset[position])
                if time.perf_counter() > deadline_s:
                    break
            collate(samples)
            num_samples += len(samples)
    spent_s = {entry.code: entry.totaltime for entry in profile.getstats()}
    by_part = {part: sum(spent_s.get(f.__code__, 0.0) for f in functions) for part, functions in parts.items()}
    return num_samples, {part: part_s for part, part_s in by_part.items() if part_s}  # captions alone decode nothing


def _measure_rate(
    dataset: SampleStream, places: MicroBatches, micro_batch_size: int, workers: int, seconds: float
) -> float:
    """Samples a second of the whole loader, once it is warm, if they are taken as fast as they come."""
    batches = iter(make_loader(dataset, places, workers, torch.cuda.is_available()))
    for _ in range(1 + workers * BATCHES_AHEAD):
        next(batches)
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() < start_s + seconds:
        next(batches)
        count += 1
    return count * micro_batch_size / (time.perf_counter() - start_s)


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
    parser.add_argument("--samples-per-s", type=positive, metavar="N", help="what the step of one rank takes")
    parser.add_argument(
        "--seconds", type=positive, default=5.0, metavar="S", help="of each part (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print figures instead of a table")
    return parser


def command() -> NoReturn:
    """The console script."""
    run(main)


if __name__ == "__main__":
    command()
