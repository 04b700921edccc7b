"""Batches of images and packed captions, in the order that sample_order.py lays down.

B pairs, C, H, W an image, N tokens of all captions
"""

from __future__ import annotations

import abc
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from formats.concepts import Concepts
from formats.errors import UserError
from formats.pictures import ImageError
from formats.texts import TextError, decode_text
from model.heads import Labels
from model.masked_words import MaskedWords
from model.packing import PackedTokens, lengths_to_cu_seqlens, pack_tokens
from pipeline.data.image_transform import decode_image, random_resized_crop
from pipeline.data.masked_words import CaptionMasker, MaskedCaption
from pipeline.data.sample_order import BatchPlan, MixedOrder
from pipeline.data.shard_reader import OpenShard, ShardReader
from pipeline.data.text_masking import TextMasker

# A shard in which this many samples in a row cannot be used is no shard to train on.
_MAX_SUBSTITUTES = 64
# Micro-batches that each worker makes before they are asked for.
BATCHES_AHEAD = 4


class Sample(NamedTuple):
    """One pair ready to be batched; `problems` names the unusable samples that it stands in for.

    key: the shard and the sample's key in it
    image_CHW: empty where captions are read alone
    concepts: numbers of those that the whole caption names; None where nobody asks
    masked: places in the caption whose tokens are to be predicted, and these tokens; None where nobody does
    """

    key: str
    image_CHW: Tensor
    token_ids: list[int]
    problems: list[str]
    concepts: list[int] | None = None
    masked: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Batch:
    """uint8 images [B, 3, H, W], the captions packed, the longest of them in tokens, and what could not be read.

    keys: of the B samples, in order: shard and key, as in `problems`
    concepts: that their captions name, where the samples have them
    words: that are masked, where captions are read alone
    """

    images_BCHW: Tensor
    tokens_N: Tensor
    cu_seqlens_B1: Tensor
    longest_caption: int
    problems: list[str]
    keys: list[str]
    concepts: Labels | None = None
    words: MaskedWords | None = None

    def pin_memory(self) -> Batch:
        """Called by DataLoader for asynchronous copies to the device."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copies do not block where memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        return replace(
            self,
            images_BCHW=function(self.images_BCHW),
            tokens_N=function(self.tokens_N),
            cu_seqlens_B1=function(self.cu_seqlens_B1),
            concepts=None if self.concepts is None else Labels(*map(function, self.concepts)),
            words=None
            if self.words is None
            else MaskedWords(function(self.words.token_R), Labels(*map(function, self.words.labels))),
        )

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[dict[str, Any]]]:
        # a tensor goes to another process as an open file, over which both talk for a millisecond: images are worth it
        return _received, (vars(self._map(lambda tensor: tensor.numpy())) | {"images_BCHW": self.images_BCHW},)

    @property
    def text(self) -> PackedTokens:
        """The captions as the text tower takes them."""
        return pack_tokens(self.tokens_N, self.cu_seqlens_B1, self.longest_caption)


def _received(fields: dict[str, Any]) -> Batch:
    """A batch from another process."""
    return Batch(**fields)._map(torch.as_tensor)


class SampleStream(Dataset[Sample], abc.ABC):
    """Samples by their position in the stream: all of one, crop and tokens included, follows from that and the seed.

    samples_before: seen by the run where the stream's positions begin
    """

    def __init__(self, shards: ShardReader, order: MixedOrder, seed: int, samples_before: int) -> None:
        self._shards = shards
        self._order = order
        self._seed = seed
        self._samples_before = samples_before

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position; an unusable one is replaced by the next in its shard, so that batches stay full.

        Raises UserError if a shard is missing or changed, or if nothing near the sample can be used.
        """
        shard_number, first = self._order.locate(position)
        shard = self._shards.open(shard_number, partial(self._order.windows_at, position))
        problems: list[str] = []
        rng = random.Random(f"{self._seed}/{position}")
        text_rng = random.Random(f"{self._seed}/{position}/text")  # text masking moves no crop
        for distance in range(min(_MAX_SUBSTITUTES, len(shard.index.keys))):
            number = (first + distance) % len(shard.index.keys)
            key = f"{shard.url}: {shard.index.keys[number]}"
            try:
                sample = self._make(shard, number, self._samples_before + position, rng, text_rng)
                return sample._replace(key=key, problems=problems)
            except (ImageError, TextError) as error:
                problems.append(f"{key}: {error}")
        raise UserError(f"{len(problems)} samples in a row cannot be used, the first is {problems[0]}")

    @abc.abstractmethod
    def _make(
        self, shard: OpenShard, number: int, samples_seen: int, rng: random.Random, text_rng: random.Random
    ) -> Sample:
        """The n-th sample of a shard, still nameless; raises ImageError or TextError for one that cannot be used."""


class TrainingSet(SampleStream):
    """Pairs."""

    def __init__(
        self,
        shards: ShardReader,
        order: MixedOrder,
        seed: int,
        text_masker: TextMasker,
        image_size: int,
        crop_min_area: float,
        concepts: Concepts | None = None,
        samples_before: int = 0,
    ) -> None:
        """concepts: to be found in captions"""
        super().__init__(shards, order, seed, samples_before)
        self._text_masker = text_masker
        self._image_size = image_size
        self._crop_min_area = crop_min_area
        self._concepts = concepts

    def _make(
        self, shard: OpenShard, number: int, samples_seen: int, rng: random.Random, text_rng: random.Random
    ) -> Sample:
        image, content = shard.read(number)
        crop_CHW = random_resized_crop(decode_image(image), self._image_size, self._crop_min_area, rng)
        caption = _decode_caption(content)
        token_ids = self._text_masker.encode(caption, text_rng, samples_seen)
        concepts = None if self._concepts is None else self._concepts.named_in(caption)
        return Sample("", crop_CHW, token_ids, [], concepts)


class CaptionSet(SampleStream):
    """Captions alone, with masked words; no picture is read."""

    def __init__(
        self, shards: ShardReader, order: MixedOrder, seed: int, masker: CaptionMasker, samples_before: int = 0
    ) -> None:
        super().__init__(shards, order, seed, samples_before)
        self._masker = masker

    def _make(
        self, shard: OpenShard, number: int, samples_seen: int, rng: random.Random, text_rng: random.Random
    ) -> Sample:
        caption = _decode_caption(shard.read_caption(number))
        return caption_sample(self._masker.mask(caption, text_rng, samples_seen))


def caption_sample(caption: MaskedCaption) -> Sample:
    """A caption without a picture, still nameless."""
    return Sample("", torch.empty(3, 0, 0, dtype=torch.uint8), caption.token_ids, [], masked=caption.masked)


def _decode_caption(caption: bytes) -> str:
    text = decode_text(caption)
    if not text:
        raise TextError("the caption is empty")
    return text


class MicroBatches(Sampler[list[int]]):
    """The positions of one rank's micro-batches, from `first_step` to `last_step` (exclusive)."""

    def __init__(self, plan: BatchPlan, rank: int, first_step: int, last_step: int) -> None:
        self._plan = plan
        self._rank = rank
        self._steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for accumulation in range(self._plan.accumulation_steps):
                yield list(self._plan.micro_batch(step, accumulation, self._rank))

    def __len__(self) -> int:
        return len(self._steps) * self._plan.accumulation_steps


def collate(samples: list[Sample]) -> Batch:
    """Stack the images, pack the captions."""
    lengths_B = torch.tensor([len(sample.token_ids) for sample in samples])
    return Batch(
        default_collate([sample.image_CHW for sample in samples]),  # in a worker, straight into shared memory
        torch.tensor([token for sample in samples for token in sample.token_ids]),
        lengths_to_cu_seqlens(lengths_B),
        int(lengths_B.max()),
        [problem for sample in samples for problem in sample.problems],
        [sample.key for sample in samples],
        _labels([sample.concepts for sample in samples if sample.concepts is not None]),
        _masked_words([sample.masked for sample in samples if sample.masked is not None], lengths_B),
    )


def _labels(rows: list[list[int]]) -> Labels | None:
    if not rows:
        return None
    numbers_M = torch.tensor([number for row in rows for number in row], dtype=torch.long)
    return Labels(numbers_M, lengths_to_cu_seqlens(torch.tensor([len(row) for row in rows])))


def _masked_words(rows: list[list[tuple[int, int]]], lengths_B: Tensor) -> MaskedWords | None:
    """Masked tokens of all captions; the first token, without a label, where nothing is masked."""
    if not rows:
        return None
    starts = (lengths_B.cumsum(0) - lengths_B).tolist()
    places = [start + place for start, row in zip(starts, rows, strict=True) for place, _ in row]
    labels = _labels([[token] for row in rows for _, token in row] or [[]])
    assert labels is not None
    return MaskedWords(torch.tensor(places or [0]), labels)


def make_loader(dataset: SampleStream, batches: MicroBatches, workers: int, pin_memory: bool) -> DataLoader[Sample]:
    """A loader whose output depends on neither the number of workers nor their speed."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        worker_init_fn=_outlast_signals,
        generator=torch.Generator(),  # its own: workers' seeds, which nothing uses, are not drawn from the process's
    )


def batches_of(loader: DataLoader[Sample]) -> Iterator[Batch]:
    """Its batches in order; raises UserError in one line for what a worker could not read."""
    try:
        yield from loader
    except UserError as error:
        # a worker's error arrives with its traceback in the message; the last line is ours
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def _outlast_signals(worker: int) -> None:
    """A signal to the whole process tree, as launchers send it, is for the training process: it needs its loader still.

    Loader processes end when that process tells them to, or when it is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
