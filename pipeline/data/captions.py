"""Captions -> token ids: by SentencePiece models or CLIP byte pairs, shortened to a budget where a recipe wants it.

Random tokens and runs after CLIPA (arXiv 2305.07017), words by frequency after CLIPF (arXiv 2412.16148);
docs/text_masking.md says where we differ. A budget counts tokens without start and end.

B captions, T longest of them in tokens
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Protocol

import fsspec
import torch
from torch import Tensor

from formats.errors import UserError
from formats.word_counts import WORD, read_word_frequencies
from pipeline.recipe import TextMaskingSection

CLIP_BPE = "clip-bpe"


class TextEncoder(Protocol):
    """What a tokenizer library must offer: ids of a text without special tokens, and the ids of those."""

    vocab_size: int
    start_token_id: int
    end_token_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end."""


class _SentencePiece:
    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.start_token_id: int = self._processor.bos_id()
        self.end_token_id: int = self._processor.eos_id()
        if min(self.start_token_id, self.end_token_id) < 0:
            raise ValueError("has no start or end token; train it with `data-prep tokenizer`")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids


class ClipBytePairs:
    """CLIP's tokenizer (lower-cased byte-level BPE, 49,408 tokens) from its published merges file.

    `tokens` in the order of their ids, the last two being start and end; `merges` in the order of their priority.
    """

    def __init__(self, merges_file: bytes) -> None:
        from tokenizers import Regex, Tokenizer, pre_tokenizers
        from tokenizers.models import BPE

        # a first line of comment, then more merges than were used: 2 x 256 bytes + 48,894 merges + 2 special tokens
        lines = gzip.decompress(merges_file).decode().strip().split("\n")[1 : 1 + 48_894]
        self.merges = [(first, second) for first, second in (line.split() for line in lines)]
        symbols = _byte_symbols()
        self.tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(a + b for a, b in self.merges)]
        self.tokens += ["<start_of_text>", "<end_of_text>"]
        self.vocab_size = len(self.tokens)
        self.start_token_id, self.end_token_id = self.vocab_size - 2, self.vocab_size - 1
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        self._tokenizer = Tokenizer(BPE(vocabulary, self.merges, end_of_word_suffix="</w>"))
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_clean(text)).ids
        return ids


_STRAIGHT_QUOTES = str.maketrans(dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("“”„‟", '"'))


def _clean(text: str) -> str:
    """CLIP's cleaning, with two of the repairs that it leaves to ftfy: composed letters and straight quotes."""
    # twice, as CLIP does: captions scraped from the web are often escaped twice
    text = html.unescape(html.unescape(text)).translate(_STRAIGHT_QUOTES)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def _byte_symbols() -> list[str]:
    """One printable character per byte, in the order of CLIP's vocabulary (GPT-2's byte alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


class Tokenizer:
    """Wraps captions in start and end tokens and cuts them to the context length, keeping the end token.

    `source` is what the file was, byte for byte: it travels with every checkpoint, and its hash is how a checkpoint
    knows its tokenizer.
    """

    def __init__(self, encoder: TextEncoder, source: bytes, context_length: int) -> None:
        self.encoder = encoder
        self.source = source
        self.sha256 = hashlib.sha256(source).hexdigest()
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """Token ids of one caption, at most `context_length` of them; the last is the end token."""
        return self.with_ends(self.encoder.encode(text)[: self.context_length - 2])

    def with_ends(self, ids: Sequence[int]) -> list[int]:
        """Token ids between start and end token."""
        return [self.encoder.start_token_id, *ids, self.encoder.end_token_id]

    def encode_batch(self, texts: Sequence[str]) -> Tensor:
        """Token ids of captions, zero-padded to the longest: int64 [B, T]."""
        rows = [torch.tensor(self.encode(text)) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def load_tokenizer(path: str, context_length: int) -> Tokenizer:
    """Read a SentencePiece model, a `bpe_simple_vocab_16e6.txt.gz`, or, for "clip-bpe", open_clip's copy of that.

    Raises UserError if the file is missing or is neither.
    """
    if path == CLIP_BPE:
        path = _installed_clip_merges()
    try:
        with fsspec.open(path, "rb") as file:
            source: bytes = file.read()
    except FileNotFoundError as error:
        raise UserError(
            f"no tokenizer at {path}: make one with `data-prep tokenizer SHARDS --output {path}`"
        ) from error
    return tokenizer_from_bytes(source, context_length, path)


def tokenizer_from_bytes(source: bytes, context_length: int, name: str) -> Tokenizer:
    """The tokenizer a file's content describes; `name` is for the error message."""
    is_gzip = source[:2] == b"\x1f\x8b"
    try:
        encoder: TextEncoder = ClipBytePairs(source) if is_gzip else _SentencePiece(source)
    except Exception as error:
        raise UserError(
            f"{name} is neither a SentencePiece model nor CLIP's merges file (bpe_simple_vocab_16e6.txt.gz): {error}"
        ) from error
    return Tokenizer(encoder, source, context_length)


def _installed_clip_merges() -> str:
    """Path of the merges in an installed open_clip_torch, found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        merges = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if merges.exists():
            return str(merges)
    raise UserError(
        f'tokenizer "{CLIP_BPE}" needs CLIP\'s merges: install open_clip_torch, or give the path of '
        "bpe_simple_vocab_16e6.txt.gz as data.tokenizer"
    )


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
