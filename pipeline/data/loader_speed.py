"""Where a loader's time goes, sample by sample on one core, and how fast all of it is."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import ParamSpec, TypeVar

import torch

from formats.errors import UserError
from formats.pictures import ImageError
from pipeline.data.data_loader import BATCHES_AHEAD, MicroBatches, Sample, TrainingSet, collate, make_loader
from pipeline.data.image_transform import decode_image, random_resized_crop
from pipeline.data.sample_order import BatchPlan
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.training_data import TrainingData
from pipeline.recipe import Recipe

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
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


class _Clock:
    """Adds up the time of calls by what they are for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(
        self,
        part: str,
        function: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **named: _Arguments.kwargs,
    ) -> _Result:
        start_s = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start_s


def measure_loader(recipe: Recipe, data: TrainingData, seconds: float) -> LoaderSpeed:
    """Read the first samples of a run for so long, part by part in this process, then as the run would.

    Raises UserError as training would.
    """
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.context_length)
    captions = TextMasker(tokenizer, recipe.text_masking)
    encoder = tokenizer.encoder
    image_size = recipe.clip_config(encoder.vocab_size, encoder.end_token_id).vision.image_size
    clock = _Clock()
    num_samples = _measure_parts(recipe, data, captions, image_size, clock, seconds)
    open_s = clock.seconds.pop("open")
    per_sample = {part: total_s / num_samples for part, total_s in clock.seconds.items()}
    rate = _measure_rate(recipe, data, captions, image_size, seconds)
    return LoaderSpeed(num_samples, open_s, per_sample, recipe.data.workers, rate)


def _measure_parts(
    recipe: Recipe, data: TrainingData, captions: TextMasker, image_size: int, clock: _Clock, seconds: float
) -> int:
    """What TrainingSet does, a batch at a time; the number of usable samples."""
    order = data.order(recipe.data, recipe.train.seed)
    reader = ShardReader(data.shards, make_cache(recipe.data))
    num_samples, samples = 0, list[Sample]()
    deadline_s = time.perf_counter() + seconds
    for position in itertools.count():
        number, index = clock("read", order.locate, position)
        shard = clock("open", reader.open, number, partial(order.windows_at, position))
        image, caption = clock("read", shard.read, index)
        rng = Random(position)
        try:
            image_CHW = clock("decode", decode_image, image)
            crop_CHW = clock("augment", random_resized_crop, image_CHW, image_size, recipe.data.crop_min_area, rng)
            token_ids = clock("tokenise", _encode, captions, caption, rng)
            samples.append(Sample(shard.index.keys[index], crop_CHW, token_ids, []))
        except (ImageError, UnicodeDecodeError):
            if position > 100 and not (samples or num_samples):
                raise UserError(f"none of the first {position} samples can be used") from None
        if len(samples) == recipe.train.micro_batch_size or (samples and time.perf_counter() > deadline_s):
            clock("collate", collate, samples)
            num_samples += len(samples)
            samples.clear()
            if time.perf_counter() > deadline_s:
                break
    return num_samples


def _encode(captions: TextMasker, caption: bytes, rng: Random) -> list[int]:
    return captions.encode(caption.decode().strip(), rng)


def _measure_rate(recipe: Recipe, data: TrainingData, captions: TextMasker, image_size: int, seconds: float) -> float:
    """Samples a second of the whole loader, once it is warm, if they are taken as fast as they come."""
    micro = recipe.train.micro_batch_size
    reader = ShardReader(data.shards, make_cache(recipe.data))
    order = data.order(recipe.data, recipe.train.seed)
    dataset = TrainingSet(reader, order, recipe.train.seed, captions, image_size, recipe.data.crop_min_area)
    places = MicroBatches(BatchPlan(data.num_samples, micro, micro, world_size=1), 0, 0, 1 << 40)
    batches = iter(make_loader(dataset, places, recipe.data.workers, torch.cuda.is_available()))
    for _ in range(1 + recipe.data.workers * BATCHES_AHEAD):
        next(batches)
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() < start_s + seconds:
        next(batches)
        count += 1
    return count * micro / (time.perf_counter() - start_s)
