"""Captions -> token ids: by SentencePiece models or CLIP byte pairs.

B captions, T longest of them in tokens
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import fsspec
import torch
from torch import Tensor

from formats.errors import UserError

CLIP_BPE = "clip-bpe"
# CLIP's words in a lower-cased text without other characters: with \p{L} and \p{N} as in `ClipBytePairs`.
_ASCII_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
# The words met first are the frequent ones; the rest of a web corpus would fill a worker's memory.
_MAX_KNOWN_WORDS = 100_000


class TokenSpans(NamedTuple):
    """A text as the tokenizer reads it, its token ids, and which characters [begin, end) each token stands for."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


class TextEncoder(Protocol):
    """What a tokenizer library must offer: ids of a text without special tokens, and the ids of those."""

    vocab_size: int
    start_token_id: int
    end_token_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end."""

    def encode_with_spans(self, text: str) -> TokenSpans:
        """The same with their places in the text."""


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

    def encode_with_spans(self, text: str) -> TokenSpans:
        """Of the normalised text, which the pieces spell: how to ask for offsets differs between versions."""
        ids, pieces = self.encode(text), self._processor.encode(text, out_type=str)
        contents = [
            bytes([int(piece[3:5], 16)]) if self._processor.is_byte(number) else piece.replace("\u2581", " ").encode()
            for number, piece in zip(ids, pieces, strict=True)
        ]
        whole = b"".join(contents)
        # before each byte, how many characters began up to there and with it
        begun = [0, *itertools.accumulate((byte & 0xC0) != 0x80 for byte in whole)]
        ends = list(itertools.accumulate(map(len, contents)))
        spans = [(begun[end - len(part) + 1] - 1, begun[end]) for end, part in zip(ends, contents, strict=True)]
        return TokenSpans(whole.decode(errors="replace"), ids, spans)


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

        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        cleaned = _clean(text)
        if not cleaned.isascii():
            return list(self._tokenizer.encode(cleaned).ids)
        # no pair is merged across words, and most captions consist of words that were met before
        return [token_id for word in _ASCII_WORDS.findall(cleaned) for token_id in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        ids = self._known.get(word)
        if ids is None:
            ids = list(self._tokenizer.encode(word).ids)
            if len(self._known) < _MAX_KNOWN_WORDS:
                self._known[word] = ids
        return ids

    def encode_with_spans(self, text: str) -> TokenSpans:
        cleaned = _clean(text)
        encoded = self._tokenizer.encode(cleaned)
        return TokenSpans(cleaned, encoded.ids, encoded.offsets)


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
