"""CLIP's byte pairs as files of Hugging Face's tokenizers, which both libraries' folders may have: read and written."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from formats.errors import UserError
from pipeline.data.captions import ClipBytePairs, TextEncoder, Tokenizer, tokenizer_from_bytes

# transformers knows CLIP's two special tokens under these names only
_START_TOKEN, _END_TOKEN = "<|startoftext|>", "<|endoftext|>"
_MERGES, _VOCABULARY, _ALL_IN_ONE = "merges.txt", "vocab.json", "tokenizer.json"
_FIRST_LINE = "#version: 0.2"
# Of the merges that open_clip and OpenAI's CLIP have, one a line.
_CLIPS_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def byte_pairs_of(encoder: TextEncoder) -> ClipBytePairs:
    """The same encoder; ValueError if it is another kind."""
    if not isinstance(encoder, ClipBytePairs):
        raise ValueError(
            "a SentencePiece tokenizer, and their CLIP models read byte pairs: captions would silently get other ids; "
            "train with data.tokenizer=clip-bpe, or with one of `data-prep tokenizer --model-type byte-pairs`"
        )
    return encoder


def is_clips_own(pairs: ClipBytePairs) -> bool:
    """Whether they are CLIP's, and not others of their form."""
    return hashlib.sha256("\n".join(_lines(pairs)).encode()).hexdigest() == _CLIPS_SHA256


def tokenizer_files(encoder: TextEncoder, context_length: int) -> dict[str, str]:
    """The files of transformers' CLIPTokenizer; ValueError if it cannot hold this tokenizer."""
    pairs = byte_pairs_of(encoder)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": _START_TOKEN,
        "eos_token": _END_TOKEN,
        "unk_token": _END_TOKEN,
        "pad_token": _END_TOKEN,
        "do_lower_case": True,
        "model_max_length": context_length,
    }
    return {
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        _VOCABULARY: json.dumps(_ids(pairs), ensure_ascii=False) + "\n",
        _MERGES: "\n".join([_FIRST_LINE, *_lines(pairs)]) + "\n",
    }


def read_byte_pairs(folder: Path, context_length: int) -> Tokenizer | None:
    """The byte pairs that lie in a folder, None if there are none; UserError for another tokenizer's files."""
    try:
        if (folder / _MERGES).is_file():
            file = folder / _MERGES
            source = file.read_bytes()
            vocabulary = folder / _VOCABULARY
            ids = json.loads(vocabulary.read_text(encoding="utf-8")) if vocabulary.is_file() else None
        elif (folder / _ALL_IN_ONE).is_file():
            file = folder / _ALL_IN_ONE
            source, ids = _parts_of(json.loads(file.read_text(encoding="utf-8")))
        else:
            return None
        # compressed as CLIP publishes them, without a time, so that equal merges have equal hashes
        tokenizer = tokenizer_from_bytes(gzip.compress(source, mtime=0), context_length, str(file))
        if ids is not None and ids != _ids(byte_pairs_of(tokenizer.encoder)):
            raise ValueError("its ids are not in the order of CLIP's byte pairs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} has a tokenizer that cannot be used here: {error}") from error
    return tokenizer


def _lines(pairs: ClipBytePairs) -> list[str]:
    return [f"{first} {second}" for first, second in pairs.merges]


def _ids(pairs: ClipBytePairs) -> dict[str, int]:
    return {token: index for index, token in enumerate([*pairs.tokens[:-2], _START_TOKEN, _END_TOKEN])}


def _parts_of(content: dict[str, Any]) -> tuple[bytes, dict[str, int]]:
    """The merges as a file of them, and the ids, of a `tokenizer.json`; ValueError if it is not CLIP's kind."""
    model, text = content["model"], json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>" or "ByteLevel" not in text:
        raise ValueError(f"{_ALL_IN_ONE} is {model.get('type')}, not CLIP's byte pairs")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return "\n".join([_FIRST_LINE, *(f"{first} {second}" for first, second in pairs)]).encode(), model["vocab"] | added
