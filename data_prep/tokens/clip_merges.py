"""Byte pairs in CLIP's form: its own, from its published merges file, or others that are trained on captions."""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

from formats.errors import UserError

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894  # of the file's many, those that CLIP uses
SINGLE_BYTES = 512  # each alone, and at the end of a word
_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


class ClipBytePairs:
    """Lower-cased byte-level BPE (Radford et al. 2021); ids below 512 are single bytes, of which 94 are ASCII signs.

    Then come the pairs in the order of their priority, and in the models a start and an end token.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        self.merges = merges
        symbols = _byte_symbols()
        pieces = [*symbols, *(symbol + "</w>" for symbol in symbols), *(first + second for first, second in merges)]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        self.vocab_size = len(pieces) + 2
        self._tokenizer = _tokenizer(BPE(vocabulary, list(merges), end_of_word_suffix="</w>"))

    @classmethod
    def read(cls, merges_file: Path) -> ClipBytePairs:
        """CLIP's own; raises UserError for a file that is not CLIP's merges."""
        try:
            lines = gzip.decompress(merges_file.read_bytes()).decode().strip().split("\n")[1 : 1 + MERGES]
            merges = [(first, second) for first, second in (line.split() for line in lines)]
            if len(merges) < MERGES:
                raise ValueError(f"{len(merges):,} merges where CLIP has {MERGES:,}")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"{merges_file} is not CLIP's {MERGES_FILE}: {error}") from error
        return cls(merges)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> ClipBytePairs:
        """The pairs that are most frequent in captions, for a vocabulary of at most `vocab_size`."""
        tokenizer = _tokenizer(BPE(end_of_word_suffix="</w>"))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            end_of_word_suffix="</w>",
            initial_alphabet=_byte_symbols(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_clean, captions), trainer)
        merges = [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]
        return cls(merges[: vocab_size - SINGLE_BYTES - 2])

    def to_file(self) -> bytes:
        """The content of a merges file as CLIP publishes its own; the same bytes for the same pairs."""
        lines = ["#version: 0.2", *(f"{first} {second}" for first, second in self.merges)]
        return gzip.compress("\n".join(lines).encode(), mtime=0)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without start and end."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch([_clean(text) for text in texts])]

    def is_byte(self, token: int) -> bool:
        """Whether a token is a single byte of a character beyond ASCII."""
        ascii_signs = 94
        return token < SINGLE_BYTES and token % 256 >= ascii_signs


def _tokenizer(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def installed_merges() -> Path | None:
    """The merges in an installed open_clip_torch, found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    paths = [Path(folder) / MERGES_FILE for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((path for path in paths if path.exists()), None)


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(text))
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def _byte_symbols() -> list[str]:
    """One printable character per byte, in the order of CLIP's vocabulary (GPT-2's byte alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
