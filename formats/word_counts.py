"""How often each word occurs in the training captions: the file that `data-prep words` writes (docs/formats.md)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import fsspec
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from formats.errors import UserError

# What `data-prep words` counts, in lower case.
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")

FORMAT_VERSION = 1

_MAKE_IT = "make it with `data-prep words SHARDS --output words.json`"


@dataclass(frozen=True)
class WordFrequencies:
    """Each lower-case word's share of all words, in (0, 1]; `sha256` of the file names it in a run's records.

    cluster_sizes: of a word, the geometric mean of the sizes of the clusters of its occurrences; empty: not known
    """

    frequencies: dict[str, float]
    sha256: str
    cluster_sizes: dict[str, float] = field(default_factory=dict)


class _WordCounts(BaseModel):
    model_config = ConfigDict(strict=True)

    format_version: Literal[1]
    words: PositiveInt
    counts: dict[str, PositiveInt]
    cluster_sizes: dict[str, Annotated[float, Field(ge=1, allow_inf_nan=False)]] = {}


def read_word_frequencies(path: str) -> WordFrequencies:
    """Read a words.json, any fsspec URL.

    Raises UserError if it is missing or its content is not what `data-prep words` writes.
    """
    try:
        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot read word counts at {path} ({error}): {_MAKE_IT}") from error
    try:
        parsed = _WordCounts.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())
        raise UserError(f"{path} is not a word-count file ({reason}): {_MAKE_IT}") from None
    if sum(parsed.counts.values()) > parsed.words:
        raise UserError(f"{path} is not a word-count file (its counts exceed its {parsed.words:,} words): {_MAKE_IT}")
    frequencies = {word: count / parsed.words for word, count in parsed.counts.items()}
    return WordFrequencies(frequencies, hashlib.sha256(content).hexdigest(), parsed.cluster_sizes)
