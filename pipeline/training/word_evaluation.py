"""How well masked words of held-out captions are predicted, while a stage trains for that.

All runs have the same places masked, whatever their curriculum; they follow from a caption's place in its set: 15 % of
tokens, of any whole words, and once more of the concepts of all stages, if there are some.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from model.masked_words import MaskedWordCLIP
from pipeline.data.captions import Tokenizer
from pipeline.data.curriculum import NO_CONCEPTS, Curriculum
from pipeline.data.data_loader import caption_sample, collate
from pipeline.data.masked_words import CaptionMasker
from pipeline.ranks import Ranks


def held_out_maskers(tokenizer: Tokenizer, taught: Curriculum | None, longest: int) -> dict[str, CaptionMasker]:
    """By the name of what is measured with each; captions are cut to `longest` tokens."""
    maskers = {"masked_token_accuracy": CaptionMasker(tokenizer, Curriculum(NO_CONCEPTS, ()), "none", longest)}
    if taught is not None and taught.concepts.concepts:
        every_stage = Curriculum(taught.concepts, ())
        maskers["masked_concept_accuracy"] = CaptionMasker(tokenizer, every_stage, "concepts", longest)
    return maskers


@torch.no_grad()
def masked_token_accuracy(
    clip: MaskedWordCLIP, captions: Sequence[str], masker: CaptionMasker, batch_size: int, ranks: Ranks
) -> float | None:
    """Share of the masked tokens that are predicted, the same on all ranks; None if none is masked. Collective.

    With ZeRO stage 3 the weights are collected at every batch: ranks predict equally many, the last ones in vain.
    """
    num_batches = -(-len(captions) // batch_size)
    per_rank = -(-num_batches // ranks.world_size)
    found_2 = torch.zeros(2, device=ranks.device)
    for number in range(per_rank * ranks.rank, per_rank * (ranks.rank + 1)):
        first = min(number, num_batches - 1) * batch_size
        places = range(first, min(first + batch_size, len(captions)))
        masked = [masker.mask(captions[place], Random(place), 0) for place in places]
        batch = collate([caption_sample(caption) for caption in masked]).to(ranks.device)
        assert batch.words is not None
        count, hits = batch.words.num_masked, clip.predict(batch.text, batch.words).hits
        if number < num_batches:
            found_2 += torch.stack((count * hits, torch.full_like(hits, count)))
    right, total = ranks.mean(found_2).tolist()
    return right / total if total else None
