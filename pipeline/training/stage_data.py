"""The data of a stage: its order of samples, the batches that this rank reads of it, and what was seen of each set."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from formats.manifest import Shard
from pipeline.data.captions import Tokenizer
from pipeline.data.coverage import describe_coverage
from pipeline.data.data_loader import (
    Batch,
    CaptionSet,
    MicroBatches,
    SampleStream,
    TrainingSet,
    batches_of,
    make_loader,
)
from pipeline.data.masked_words import CaptionMasker
from pipeline.data.sample_order import MixedOrder
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import TrainingData
from pipeline.ranks import Ranks
from pipeline.training.stage_plan import Stage


def make_training_set(stage: Stage, shards: Sequence[Shard], order: MixedOrder, tokenizer: Tokenizer) -> SampleStream:
    """The samples of a stage, with what its recipe wants of them."""
    recipe, curriculum = stage.recipe, stage.curriculum
    objective, reader = recipe.concepts.objective, ShardReader(shards, make_cache(recipe.data))
    samples_before = stage.starts[-1].samples_seen - stage.first_position
    if masker := make_caption_masker(stage, tokenizer):
        return CaptionSet(reader, order, stage.seed, masker, samples_before)
    return TrainingSet(
        reader,
        order,
        stage.seed,
        TextMasker(tokenizer, recipe.text_masking, curriculum if objective == "keep" else None),
        stage.model.vision.image_size,
        recipe.data.crop_min_area,
        concepts=curriculum.concepts if curriculum and objective == "predict" else None,
        samples_before=samples_before,
    )


def make_caption_masker(stage: Stage, tokenizer: Tokenizer) -> CaptionMasker | None:
    """What masks words of captions, in a stage in which they are predicted."""
    recipe, curriculum = stage.recipe, stage.curriculum
    if curriculum is None or not recipe.masks_words:
        return None
    return CaptionMasker(tokenizer, curriculum, recipe.concepts.curriculum, recipe.longest_caption)


class StageData:
    """What one stage reads."""

    def __init__(self, stage: Stage, data: TrainingData, tokenizer: Tokenizer, ranks: Ranks) -> None:
        self._stage = stage
        self._data = data
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._order = data.order(stage.recipe.data, stage.seed)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """This rank's micro-batches from a step of the run to the stage's end."""
        stage, section = self._stage, self._stage.recipe.data
        dataset = make_training_set(stage, self._data.shards_of(section), self._order, self._tokenizer)
        places = MicroBatches(stage.batches, self._ranks.rank, first_step, stage.end_step)
        loader = make_loader(dataset, places, section.workers, self._ranks.device.type == "cuda")
        return batches_of(loader)

    def samples_seen_by_set(self, step: int) -> dict[str, int]:
        """In the first `step` steps of the run; empty where there is one set only."""
        if len(self._data.sets) == 1:
            return {}
        counts = self._order.samples_by_set(self._stage.positions(step))
        return dict(zip(self._data.names, counts, strict=True))

    def say_coverage(self, step: int) -> None:
        """Print what was seen of each epoch that a step, counted from 0, completed; nobody waits for long."""
        plan, epochs = self._stage.batches, self._stage.epochs
        for epoch in range(epochs.at(plan.position(step)), epochs.at(plan.position(step + 1))):
            section = self._stage.recipe.data
            if section.balances or section.sampling == "with_replacement":  # every sample is counted
                threading.Thread(target=self._say_coverage_of, args=(epoch,), daemon=True, name="coverage").start()
            else:
                self._say_coverage_of(epoch)

    def _say_coverage_of(self, epoch: int) -> None:
        read = range(self._stage.epochs.start(epoch), self._stage.epochs.start(epoch + 1))
        print(describe_coverage(f"epoch {epoch + 1}", self._data, self._order, [read]), flush=True)
