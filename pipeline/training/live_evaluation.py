"""Evaluation of the weights that are being trained: all ranks encode equal shares, the main one scores.

A stage that predicts masked words is evaluated by these, on the captions of sets for retrieval.

Nothing of training is touched: no generator is used, no gradient kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import UserError
from formats.pictures import ImageError
from model.clip import CLIP
from model.masked_words import MaskedWordCLIP
from model.packing import normalize_pixels
from pipeline.data.captions import Tokenizer
from pipeline.data.curriculum import Curriculum
from pipeline.data.image_transform import decode_image, resize_center_crop
from pipeline.evaluation.jobs import tasks_of
from pipeline.evaluation.sets.files import Collection, ImageFile
from pipeline.evaluation.sets.layouts import EvaluationSet, RetrievalSet, open_evaluation_sets
from pipeline.evaluation.tasks.task import Task, distinct
from pipeline.ranks import Ranks
from pipeline.recipe import EvaluationSection
from pipeline.training.word_evaluation import held_out_maskers, masked_token_accuracy


class LiveEvaluation:
    """Evaluates a stage's model on the recipe's sets. Raises UserError at once for a set that cannot be used."""

    def __init__(self, section: EvaluationSection, tokenizer: Tokenizer, ranks: Ranks) -> None:
        self._section = section
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._jobs: list[tuple[EvaluationSet, Task]] = []
        for dataset in open_evaluation_sets([Path(directory) for directory in section.data]).values():
            self._jobs += [(dataset, task) for task in tasks_of(dataset, None)]

    def is_due(self, step: int, at_least: bool = False) -> bool:
        """Whether the recipe evaluates after so many steps; where it does at all, it does `at_least` then."""
        return bool(self._jobs) and (at_least or step % self._section.every_steps == 0)

    @torch.no_grad()
    def figures(self, clip: CLIP, taught: Curriculum | None = None) -> dict[str, float]:
        """`eval/SET/METRIC` of all sets, the same on all ranks; `taught`: the stage's concepts. Collective."""
        if isinstance(clip, MaskedWordCLIP):
            return self._word_figures(clip, taught)
        figures: dict[str, float] = {}
        for dataset, task in self._jobs:
            features = {name: self._encode(clip, collection) for name, collection in task.collections(dataset).items()}
            metrics = task.score(dataset, features).metrics
            figures |= {f"eval/{dataset.name}/{name}": value for name, value in metrics.items()}
        return figures

    def _word_figures(self, clip: MaskedWordCLIP, taught: Curriculum | None) -> dict[str, float]:
        figures = {}
        maskers = held_out_maskers(self._tokenizer, taught, clip.config.text.context_length)
        for dataset in {dataset.name: dataset for dataset, _ in self._jobs}.values():
            if not isinstance(dataset, RetrievalSet):
                continue
            captions, _ = distinct(dataset.captions)
            for name, masker in maskers.items():
                accuracy = masked_token_accuracy(clip, captions, masker, self._section.batch_size, self._ranks)
                if accuracy is not None:
                    figures[f"eval/{dataset.name}/{name}"] = accuracy
        return figures

    def _encode(self, clip: CLIP, collection: Collection) -> Tensor:
        """Features of all items on every rank, fp32 [N, D] on the CPU.

        With ZeRO stage 3 the weights are collected at every batch: ranks encode equally many, the last ones in vain.
        """
        size, world_size = self._section.batch_size, self._ranks.world_size
        num_batches = -(-len(collection) // size)
        per_rank = -(-num_batches // world_size)
        mine = range(per_rank * self._ranks.rank, per_rank * (self._ranks.rank + 1))
        parts = [torch.empty(0, clip.config.embed_dim, device=self._ranks.device)]
        failure: UserError | None = None
        with ThreadPoolExecutor(self._section.workers) as pool:
            for batch in mine:
                first = min(batch, num_batches - 1) * size
                try:
                    features_BD = self._encode_batch(clip, collection.items[first : first + size], pool)
                except UserError as error:  # the others wait for this rank at the next batch
                    failure = failure or error
                    features_BD = self._encode_batch(clip, [], pool)
                if batch < num_batches:
                    parts.append(features_BD)
        if self._ranks.any(failure is not None):
            raise failure or UserError("another rank could not encode its share of an evaluation: its message says why")
        return self._ranks.gather_rows(torch.cat(parts)).cpu()

    def _encode_batch(self, clip: CLIP, items: Sequence[Any], pool: ThreadPoolExecutor) -> Tensor:
        device, size = self._ranks.device, clip.config.vision.image_size
        if not items or isinstance(items[0], ImageFile):
            images = list(pool.map(lambda image: _load(image, size), items))
            images = images or [torch.zeros(3, size, size, dtype=torch.uint8)]
            return clip.encode_image(normalize_pixels(torch.stack(images).to(device))).float()
        return clip.encode_text(self._tokenizer.encode_batch(items).to(device)).float()


def _load(image: ImageFile, size: int) -> Tensor:
    try:
        return resize_center_crop(decode_image(image.read()), size)
    except ImageError as error:
        raise UserError(f"{image} does not decode: {error}; an evaluation leaves no sample out") from error
