"""Captions of which some words are masked, for the text tower to predict them: which words, and what stands there.

Concepts by stages after CCM (arXiv 2212.07617), whose other curricula are here too; docs/concepts.md defines each. 80 %
of what is chosen is masked, 10 % becomes random tokens, 10 % stays, as in BERT.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from formats.word_counts import WORD
from pipeline.data.captions import Tokenizer, TokenSpans
from pipeline.data.curriculum import Curriculum
from pipeline.recipe import CurriculumKind

MASKED_SHARE = 0.15
_MASK, _RANDOM = 0.8, 0.9  # a draw below the first masks, below the second replaces


class Span(NamedTuple):
    """Tokens or words from `first` to `last`, exclusive."""

    first: int
    last: int


class MaskedCaption(NamedTuple):
    """Token ids from start to end as the tower sees them; (place, true token) of what it has to predict."""

    token_ids: list[int]
    masked: list[tuple[int, int]]


def tokens_of_words(encoded: TokenSpans) -> tuple[list[str], list[Span]]:
    """The lower-cased words of a text, and the tokens that stand for some of each word's characters."""
    begins = [begin for begin, _ in encoded.spans]
    ends = [max(end, begin + 1) for begin, end in encoded.spans]  # bytes of one character share its place
    found = list(WORD.finditer(encoded.text))
    spans = [Span(bisect.bisect_right(ends, m.start()), bisect.bisect_left(begins, m.end())) for m in found]
    return [m[0].lower() for m in found], spans


def choose_spans(candidates: Sequence[Span], budget: int, rng: Random) -> list[Span]:
    """Spans in random order, none over another, as long as `budget` tokens hold them; ascending.

    The first is taken even if it is longer: else a concept of many tokens were never masked in a short caption.
    """
    chosen: list[Span] = []
    taken: set[int] = set()
    for span in rng.sample(candidates, len(candidates)):
        tokens = range(*span)
        fits = len(taken) + len(tokens) <= budget or not chosen
        if fits and taken.isdisjoint(tokens):
            taken.update(tokens)
            chosen.append(span)
    return sorted(chosen)


class CaptionMasker:
    """Encodes captions and masks whole words or concepts of them, as the curriculum's stage says.

    longest: caption in tokens, start and end included; longer ones are cut
    """

    def __init__(self, tokenizer: Tokenizer, curriculum: Curriculum, kind: CurriculumKind, longest: int) -> None:
        self._tokenizer = tokenizer
        self._curriculum = curriculum
        self._kind = kind
        self._longest = longest
        self._stage_of_word = _stages_by_rarity(curriculum) if kind == "rarity" else {}

    def mask(self, caption: str, rng: Random, samples_seen: int) -> MaskedCaption:
        """A caption as it is after so many samples of the run; the same for the same `rng`."""
        stage = self._curriculum.stage(samples_seen)
        encoded = self._tokenizer.encoder.encode_with_spans(caption)
        ids = encoded.ids[: self._longest_at(stage) - 2]
        words, tokens = tokens_of_words(encoded)
        spans = [Span(tokens[unit.first].first, tokens[unit.last - 1].last) for unit in self._candidates(words, stage)]
        whole = sorted({span for span in spans if span.first < span.last <= len(ids)})
        budget = max(1, round(self._share_at(stage) * len(ids)))
        masked = list[tuple[int, int]]()
        for span in choose_spans(whole, budget, rng):
            masked += [(1 + place, ids[place]) for place in range(*span)]  # behind the start token
            ids[span.first : span.last] = self._shown(ids[span.first : span.last], rng)
        return MaskedCaption(self._tokenizer.with_ends(ids), masked)

    def _candidates(self, words: Sequence[str], stage: int) -> list[Span]:
        """What may be masked, in words."""
        if self._kind == "concepts":
            concepts = self._curriculum.concepts
            taught = concepts.up_to(stage)
            return [Span(found.first, found.last) for found in concepts.occurrences(words) if found.number < taught]
        last_stage = self._curriculum.num_stages
        is_taught = [self._stage_of_word.get(word, last_stage) <= stage for word in words]
        return [Span(i, i + 1) for i in range(len(words)) if self._kind != "rarity" or is_taught[i]]

    def _share_at(self, stage: int) -> float:
        """Of a caption's tokens that are to be masked; `masking_ratio` rises, with the same mean over its stages."""
        if self._kind != "masking_ratio" or not self._curriculum.boundaries:
            return MASKED_SHARE
        return MASKED_SHARE * 2 * stage / (self._curriculum.num_stages + 1)

    def _longest_at(self, stage: int) -> int:
        if self._kind != "length":
            return self._longest
        return max(3, math.ceil(self._longest * stage / self._curriculum.num_stages))

    def _shown(self, ids: Sequence[int], rng: Random) -> list[int]:
        """What stands where a concept was: masks, which have the id after the vocabulary's last, any tokens, or it."""
        draw = rng.random()
        if draw < _MASK:
            return [self._tokenizer.encoder.vocab_size] * len(ids)
        return [self._any_token(rng) for _ in ids] if draw < _RANDOM else list(ids)

    def _any_token(self, rng: Random) -> int:
        """Of the vocabulary, but no start or end."""
        encoder = self._tokenizer.encoder
        while True:
            token = rng.randrange(encoder.vocab_size)
            if token not in (encoder.start_token_id, encoder.end_token_id):
                return token


def _stages_by_rarity(curriculum: Curriculum) -> dict[str, int]:
    """The stage of each word that is a concept: by their counts, in equal parts, the frequent ones first."""
    counts = {concept.concept: concept.count for concept in curriculum.concepts.concepts if " " not in concept.concept}
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: 1 + rank * curriculum.num_stages // len(by_count) for rank, word in enumerate(by_count)}
