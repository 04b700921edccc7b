"""Text masking: captions over a token budget keep their first tokens, random ones, a random run, or their rarer words.

Random tokens and runs after CLIPA (arXiv 2305.07017), words by frequency after CLIPF (arXiv 2412.16148);
docs/text_masking.md says where we differ. A budget counts tokens without start and end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from formats.word_counts import WORD, read_word_frequencies
from pipeline.data.tokenizer import TextEncoder, Tokenizer
from pipeline.recipe import TextMaskingSection

# The words met first are the frequent ones; the rest of a web corpus would fill a worker's memory.
_MAX_CACHED_WORDS = 100_000


def random_tokens(ids: Sequence[int], budget: int, rng: Random) -> list[int]:
    """A uniformly random choice of `budget` tokens, in their order; at least that many are given."""
    return [ids[index] for index in sorted(rng.sample(range(len(ids)), budget))]


def random_block(ids: Sequence[int], budget: int, rng: Random) -> list[int]:
    """A run of `budget` tokens that starts anywhere with equal probability; at least that many are given."""
    start = rng.randrange(len(ids) - budget + 1)
    return list(ids[start : start + budget])


def drop_probability(frequency: float, threshold: float) -> float:
    """CLIPF's max(0, 1 - sqrt(threshold / frequency)): 0 up to the threshold, towards 1 for frequent words."""
    return max(0.0, 1 - math.sqrt(threshold / frequency))


def choose_words(lengths: Sequence[int], drop_probabilities: Sequence[float], budget: int, rng: Random) -> list[int]:
    """Which words to keep, ascending: the best by u - drop probability, u uniform in [0, 1), as the budget allows.

    `lengths` are in tokens. A word that does not fit any more is passed over for the next best that does.
    """
    scores = [rng.random() - probability for probability in drop_probabilities]
    kept = []
    for index in sorted(range(len(scores)), key=scores.__getitem__, reverse=True):
        if lengths[index] <= budget:
            budget -= lengths[index]
            kept.append(index)
    return sorted(kept)


class WordMasker:
    """Cuts captions by whole words, frequent ones first; what is between the words goes.

    A word without a frequency is rarer than all that have one, and is treated like the rarest of these.
    """

    def __init__(self, encoder: TextEncoder, frequencies: dict[str, float], threshold: float) -> None:
        self._encoder = encoder
        self._drop = {word: drop_probability(frequency, threshold) for word, frequency in frequencies.items()}
        self._drop_unknown = min(self._drop.values(), default=0.0)
        self._lengths: dict[str, int] = {}

    def cut(self, caption: str, budget: int, rng: Random) -> list[int]:
        """Token ids of the words that are kept, as a caption of just these has them; empty if none fits."""
        words = WORD.findall(caption)
        lengths = [self._length(word) for word in words]
        drop_probabilities = [self._drop.get(word.lower(), self._drop_unknown) for word in words]
        kept = choose_words(lengths, drop_probabilities, budget, rng)
        # lengths add up where no piece reaches over a space, which SentencePiece can be told to allow
        return self._encoder.encode(" ".join(words[index] for index in kept))[:budget]

    def _length(self, word: str) -> int:
        length = self._lengths.get(word)
        if length is None:
            length = len(self._encoder.encode(word))
            if len(self._lengths) < _MAX_CACHED_WORDS:
                self._lengths[word] = length
        return length


class TextMasker:
    """Encodes training captions, and cuts those over the budget as the recipe says.

    `word_counts_sha256` names the file of word counts, None if the strategy needs none. Raises UserError if that
    cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, options: TextMaskingSection) -> None:
        self._tokenizer = tokenizer
        self._strategy = options.strategy
        max_tokens = None if options.strategy == "none" else options.max_tokens
        self._budget = (max_tokens or tokenizer.context_length) - 2
        self._words: WordMasker | None = None
        self.word_counts_sha256: str | None = None
        if options.strategy == "frequency":
            known = read_word_frequencies(options.word_counts)
            self._words = WordMasker(tokenizer.encoder, known.frequencies, options.frequency_threshold)
            self.word_counts_sha256 = known.sha256

    def encode(self, caption: str, rng: Random) -> list[int]:
        """Token ids from the start to the end token; of a caption within the budget, all of them."""
        ids = self._tokenizer.encoder.encode(caption)
        if len(ids) > self._budget:
            ids = self._cut(caption, ids, rng)
        return self._tokenizer.with_ends(ids)

    def _cut(self, caption: str, ids: list[int], rng: Random) -> list[int]:
        if self._strategy == "random":
            return random_tokens(ids, self._budget, rng)
        if self._strategy == "block":
            return random_block(ids, self._budget, rng)
        truncated = ids[: self._budget]
        if self._words is None:
            return truncated
        # without words, or with none that fits, a caption is truncated after all
        return self._words.cut(caption, self._budget, rng) or truncated
