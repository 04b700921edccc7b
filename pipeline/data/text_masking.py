"""What is left of captions that are longer than a recipe wants.

Random tokens and runs after CLIPA (arXiv 2305.07017), words by frequency after CLIPF (arXiv 2412.16148), words by the
stages of their concepts; docs/text_masking.md says where we differ. A budget counts tokens without start and end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from formats.concepts import Occurrence
from formats.word_counts import WORD, read_word_frequencies
from pipeline.data.captions import TextEncoder, Tokenizer
from pipeline.data.curriculum import Curriculum
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


class WordLengths:
    """How many tokens each word has, and the tokens of words that are put together again."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._lengths: dict[str, int] = {}

    def of(self, word: str) -> int:
        """Tokens of one word."""
        length = self._lengths.get(word)
        if length is None:
            length = len(self._encoder.encode(word))
            if len(self._lengths) < _MAX_CACHED_WORDS:
                self._lengths[word] = length
        return length

    def encode(self, words: Sequence[str], budget: int) -> list[int]:
        """As a caption of just these words; in the budget, where their lengths are."""
        # lengths add up where no piece reaches over a space, which SentencePiece can be told to allow
        return self._encoder.encode(" ".join(words))[:budget]


class WordMasker:
    """Cuts captions by whole words, frequent ones first; what is between the words goes.

    A word without a frequency is rarer than all that have one, and is treated like the rarest of these.
    """

    def __init__(self, encoder: TextEncoder, frequencies: dict[str, float], threshold: float) -> None:
        self._lengths = WordLengths(encoder)
        self._drop = {word: drop_probability(frequency, threshold) for word, frequency in frequencies.items()}
        self._drop_unknown = min(self._drop.values(), default=0.0)

    def cut(self, caption: str, budget: int, rng: Random) -> list[int]:
        """Token ids of the words that are kept, as a caption of just these has them; empty if none fits."""
        words = WORD.findall(caption)
        drop_probabilities = [self._drop.get(word.lower(), self._drop_unknown) for word in words]
        kept = choose_words([self._lengths.of(word) for word in words], drop_probabilities, budget, rng)
        return self._lengths.encode([words[index] for index in kept], budget)


class ConceptMasker:
    """Cuts captions by concepts and words: those of the stage that is taught stay, then those nearest to it.

    At first the concepts of stage 1 stay, at the end they are the first to go. Chance decides within a stage. A concept
    stays or goes as a whole. Words without a concept, or whose concept is connected with none, go before all others.
    """

    def __init__(self, encoder: TextEncoder, curriculum: Curriculum) -> None:
        self._lengths = WordLengths(encoder)
        self._curriculum = curriculum

    def cut(self, caption: str, budget: int, rng: Random, samples_seen: int) -> list[int]:
        """Token ids of the words that are kept, as a caption of just these has them; empty if none fits."""
        words = WORD.findall(caption)
        concepts, stage = self._curriculum.concepts, self._curriculum.stage(samples_seen)
        units = longest_first(list(concepts.occurrences([word.lower() for word in words])), len(words))
        lengths = [sum(self._lengths.of(word) for word in words[unit.first : unit.last]) for unit in units]
        distances = [self._distance(unit.number, stage) for unit in units]
        kept = choose_words(lengths, distances, budget, rng)  # whole numbers: what is nearer comes first
        return self._lengths.encode([word for i in kept for word in words[units[i].first : units[i].last]], budget)

    def _distance(self, number: int, stage: int) -> float:
        """How far the concept's stage is from the one that is taught; further than all without a concept."""
        concepts = self._curriculum.concepts
        if number < 0 or not concepts.concepts[number].degree:
            return concepts.num_stages
        return abs(concepts.concepts[number].stage - stage)


def longest_first(occurrences: Sequence[Occurrence], num_words: int) -> list[Occurrence]:
    """A caption from left to right: the longest concept that begins at a word, or the word alone, as number -1."""
    longest = {found.first: found for found in occurrences}  # at a word the longest comes last
    units, word = list[Occurrence](), 0
    while word < num_words:
        units.append(longest.get(word, Occurrence(word, word + 1, -1)))
        word = units[-1].last
    return units


class TextMasker:
    """Encodes training captions, and cuts those over the budget as the recipe says.

    `word_counts_sha256` names the file of word counts, None if the strategy needs none. Raises UserError if that
    cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, options: TextMaskingSection, curriculum: Curriculum | None = None) -> None:
        """curriculum: to keep words by; it goes before the strategy of the options, whose budget it has."""
        self._tokenizer = tokenizer
        self._strategy = options.strategy
        is_cut = options.strategy != "none" or curriculum
        self._budget = ((options.max_tokens if is_cut else None) or tokenizer.context_length) - 2
        self._words: WordMasker | None = None
        self._concepts = ConceptMasker(tokenizer.encoder, curriculum) if curriculum else None
        self.word_counts_sha256: str | None = None
        if options.strategy == "frequency":
            known = read_word_frequencies(options.word_counts)
            self._words = WordMasker(tokenizer.encoder, known.frequencies, options.frequency_threshold)
            self.word_counts_sha256 = known.sha256

    def encode(self, caption: str, rng: Random, samples_seen: int = 0) -> list[int]:
        """Token ids from the start to the end token; of a caption within the budget, all of them.

        samples_seen: by the run before this caption's
        """
        ids = self._tokenizer.encoder.encode(caption)
        if len(ids) > self._budget:
            ids = self._cut(caption, ids, rng, samples_seen)
        return self._tokenizer.with_ends(ids)

    def _cut(self, caption: str, ids: list[int], rng: Random, samples_seen: int) -> list[int]:
        if self._strategy == "random":
            return random_tokens(ids, self._budget, rng)
        if self._strategy == "block":
            return random_block(ids, self._budget, rng)
        kept: list[int] = []
        if self._concepts:
            kept = self._concepts.cut(caption, self._budget, rng, samples_seen)
        elif self._words:
            kept = self._words.cut(caption, self._budget, rng)
        # without words, or with none that fits, a caption is truncated after all
        return kept or ids[: self._budget]
