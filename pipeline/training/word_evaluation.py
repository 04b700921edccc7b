"""How well masked words of held-out captions are predicted, while a stage trains for that.

All runs have the same places masked, whatever their curriculum: any whole words, 15 % of tokens, as the caption's place
in the set has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from formats.concepts import Concepts
from model.masked_words import MaskedWordCLIP
from pipeline.data.captions import Tokenizer
from pipeline.data.curriculum import Curriculum
from pipeline.data.data_loader import caption_sample, collate
from pipeline.data.masked_words import CaptionMasker
from pipeline.ranks import Ranks

METRIC = "masked_token_accuracy"


@torch.no_grad()
def masked_token_accuracy(
    clip: MaskedWordCLIP, captions: Sequence[str], tokenizer: Tokenizer, batch_size: int, ranks: Ranks
) -> float:
    """Share of the masked tokens that are predicted, the same on all ranks; NaN if none is masked. Collective.

    With ZeRO stage 3 the weights are collected at every batch: ranks predict equally many, the last ones in vain.
    """
    no_curriculum = Curriculum(Concepts((), captions=1, sha256=""), ())
    masker = CaptionMasker(tokenizer, no_curriculum, "none", clip.config.text.context_length)
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
    return right / total if total else float("nan")
