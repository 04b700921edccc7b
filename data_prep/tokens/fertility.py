"""How well a tokenizer fits captions: tokens per caption and word, bytes where it knows no piece, captions cut off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from data_prep.console import print_table

CONTEXT_LENGTHS = (77, 32)  # CLIP's, and that of recipes with short captions
START_AND_END = 2


@dataclasses.dataclass(frozen=True)
class Fertility:
    """Means over captions; start and end count for the share that is cut at a context length, not for the means."""

    tokens_per_caption: float
    tokens_per_word: float  # words: what stands between spaces
    byte_share: float  # of the tokens
    cut_share: dict[int, float]  # context length -> share of captions that lose tokens


def fertility(
    captions: Sequence[str], encode: Callable[[Sequence[str]], list[list[int]]], is_byte: Callable[[int], bool]
) -> Fertility:
    """Measure a tokenizer on at least one caption."""
    ids = encode(captions)
    lengths = [len(caption_ids) for caption_ids in ids]
    tokens = max(sum(lengths), 1)
    byte_tokens = sum(is_byte(token) for caption_ids in ids for token in caption_ids)
    words = max(sum(len(caption.split()) for caption in captions), 1)
    return Fertility(
        tokens_per_caption=sum(lengths) / len(captions),
        tokens_per_word=sum(lengths) / words,
        byte_share=byte_tokens / tokens,
        cut_share={
            context: sum(length + START_AND_END > context for length in lengths) / len(captions)
            for context in CONTEXT_LENGTHS
        },
    )


def print_fertility(reports: dict[str, Fertility]) -> None:
    """Print a line for each tokenizer."""
    header = ("tokenizer", "tokens/caption", "tokens/word", "bytes", *(f"cut at {c}" for c in CONTEXT_LENGTHS))
    rows = [
        (
            name,
            f"{report.tokens_per_caption:.1f}",
            f"{report.tokens_per_word:.2f}",
            f"{report.byte_share:.2%}",
            *(f"{report.cut_share[context]:.2%}" for context in CONTEXT_LENGTHS),
        )
        for name, report in reports.items()
    ]
    print_table(header, rows)
