"""The micro-batches of a step that predicts masked words: captions alone.

Ranks and micro-batches have more masked tokens or fewer. Each counts by how many it has, so that the loss is the mean
over all masked tokens of the whole batch, however that is shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from model.masked_words import MaskedWords, WordLoss
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.engines.engine import Engine
from pipeline.training.step_report import Part


def word_parts(
    engine: Engine, micro_batches: Sequence[Batch], ranks: Ranks, ended: Callable[[str], None]
) -> Iterator[Part]:
    """Every micro-batch, encoded. Collective."""
    counts = [_words_of(batch).num_masked for batch in micro_batches]
    own_mean = torch.full((), sum(counts) / len(counts), device=ranks.device)
    mean = ranks.mean(own_mean).clamp(min=1e-9)  # where nothing at all is masked, all losses are 0
    ended("masks")
    for batch, count in zip(micro_batches, counts, strict=True):
        batch = batch.to(ranks.device)
        found: WordLoss = engine(batch.text, _words_of(batch))
        ended("forward")
        share = count / mean
        loss, hits = share * found.loss, share * found.hits
        numbers = [torch.full_like(loss, number) for number in (count, batch.tokens_N.numel())]
        yield Part(loss, torch.stack([loss.detach(), hits, *numbers]), found.finite_B)


def _words_of(batch: Batch) -> MaskedWords:
    assert batch.words is not None  # a stage that asks for words has a loader that masks some
    return batch.words
