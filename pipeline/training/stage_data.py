"""The data of a stage: its order of samples, the batches that this rank reads of it, and what was seen of each set."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from pipeline.data.captions import TextMasker, Tokenizer
from pipeline.data.coverage import describe_coverage
from pipeline.data.data_loader import Batch, MicroBatches, TrainingSet, batches_of, make_loader
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.training_data import TrainingData
from pipeline.ranks import Ranks
from pipeline.training.stage_plan import Stage


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
        recipe, plan = self._stage.recipe, self._stage.batches
        captions = TextMasker(self._tokenizer, recipe.text_masking)
        image_size = self._stage.model.vision.image_size
        shards = ShardReader(self._data.shards, make_cache(recipe.data))
        dataset = TrainingSet(shards, self._order, self._stage.seed, captions, image_size, recipe.data.crop_min_area)
        places = MicroBatches(plan, self._ranks.rank, first_step, self._stage.end_step)
        loader = make_loader(dataset, places, recipe.data.workers, self._ranks.device.type == "cuda")
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
