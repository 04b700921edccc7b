"""Time per caption of each text-masking strategy relative to plain encoding, and which words a threshold prefers.

    python benchmarks/text_masking_cost.py CAPTIONS TOKENIZER… [--max-tokens 10] [--rounds 9]

CAPTIONS has one caption a line, and the words are counted in it as `data-prep words` does. Strategies are interleaved,
their order rotates, and each figure is the median over rounds of the ratio within the round. The draws of a caption,
its generator included, are part of its time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import record

from formats.word_counts import read_word_frequencies
from pipeline.data.captions import load_tokenizer
from pipeline.data.text_masking import TextMasker, WordMasker
from pipeline.recipe import TextMaskingSection

STRATEGIES = ("none", "truncate", "random", "block", "frequency")
THRESHOLDS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0)
CONTEXT_LENGTH, MAX_CAPTIONS, MIN_COUNT = 77, 10_000, 5
FREQUENT = 10

Encode = Callable[[int, str], list[int]]


def words_of(text: str) -> list[str]:
    """As the file of word counts defines them."""
    return [word.lower() for word in re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)]


def write_word_counts(captions: Sequence[str], path: str) -> None:
    """The file that `data-prep words` would make of these captions."""
    words = Counter(word for caption in captions for word in words_of(caption))
    counts = {word: count for word, count in words.most_common() if count >= MIN_COUNT}
    content = {"format_version": 1, "captions": len(captions), "words": words.total(), "counts": counts}
    Path(path).write_text(json.dumps(content))


def make_arms(tokenizer_path: str, word_counts: str, max_tokens: int) -> dict[str, Encode]:
    """What turns (position, caption) into token ids; `plain` is the tokenizer alone."""
    tokenizer = load_tokenizer(tokenizer_path, CONTEXT_LENGTH)
    arms: dict[str, Encode] = {"plain": lambda position, caption: tokenizer.encode(caption)}
    for strategy in STRATEGIES:
        options = TextMaskingSection(strategy=strategy, max_tokens=max_tokens, word_counts=word_counts)
        arms[strategy] = as_the_loader_does(TextMasker(tokenizer, options))
    return arms


def as_the_loader_does(masker: TextMasker) -> Encode:
    """A generator per caption, then the cut."""
    return lambda position, caption: masker.encode(caption, Random(f"0/0/{position}/text"))


def seconds(encode: Encode, captions: Sequence[str]) -> float:
    """Time of one pass."""
    start_s = time.perf_counter()
    for position, caption in enumerate(captions):
        encode(position, caption)
    return time.perf_counter() - start_s


def measure(arms: dict[str, Encode], captions: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time and length of a caption under each arm."""
    names = list(arms)
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):  # the first warms up
        for name in names[number % len(names) :] + names[: number % len(names)]:
            elapsed_s = seconds(arms[name], captions)
            if number >= 0:
                times_s[name].append(elapsed_s)
    return {
        name: {
            "time_over_plain": statistics.median(a / b for a, b in zip(times_s[name], times_s["plain"], strict=True)),
            "us_per_caption": statistics.median(times_s[name]) / len(captions) * 1e6,
            "mean_tokens": statistics.mean(len(encode(*item)) for item in enumerate(captions)),
        }
        for name, encode in arms.items()
    }


class RankEncoder:
    """One token per word: its rank by frequency."""

    vocab_size, start_token_id, end_token_id = 1 << 31, -2, -1

    def __init__(self, words: Sequence[str]) -> None:
        self._ranks = {word: rank for rank, word in enumerate(words)}

    def encode(self, text: str) -> list[int]:
        """Ranks of the words, those without a count all last."""
        return [self._ranks.get(word, len(self._ranks)) for word in words_of(text)]


def share_of_frequent_words(captions: Sequence[str], word_counts: str, budget: int) -> dict[str, float]:
    """Share of the ten most frequent words in captions over `budget` words, whole and cut at each threshold."""
    frequencies = read_word_frequencies(word_counts).frequencies
    encoder = RankEncoder(list(frequencies))
    long = [caption for caption in captions if len(words_of(caption)) > budget]
    cuts: dict[str, list[list[int]]] = {"whole": [encoder.encode(caption) for caption in long]}
    for threshold in THRESHOLDS:
        masker = WordMasker(encoder, frequencies, threshold)
        cuts[f"{threshold:g}"] = [masker.cut(caption, budget, Random(number)) for number, caption in enumerate(long)]
    return {name: statistics.mean(rank < FREQUENT for cut in kept for rank in cut) for name, kept in cuts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, metavar="CAPTIONS")
    parser.add_argument("tokenizers", nargs="+", metavar="TOKENIZER")
    parser.add_argument("--max-tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    captions = options.captions.read_text().splitlines()
    sample = Random(0).sample(captions, min(MAX_CAPTIONS, len(captions)))
    figures: dict[str, Any] = {"max_tokens": options.max_tokens}
    with tempfile.NamedTemporaryFile() as file:
        write_word_counts(captions, file.name)
        for path in options.tokenizers:
            arms = make_arms(path, file.name, options.max_tokens)
            figures[Path(path).name] = measure(arms, sample, options.rounds)
        figures["share_of_ten_most_frequent_words"] = share_of_frequent_words(
            sample, file.name, budget=options.max_tokens - 2
        )
    print(json.dumps(figures, indent=2))
    print(record("text_masking_cost", figures, " ".join(["python", *sys.argv]), options.rounds))


if __name__ == "__main__":
    main()
