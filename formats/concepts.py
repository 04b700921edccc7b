"""concepts.jsonl: concepts of captions, of one to four words each, in stages from what is taught first.

    {"format": "concepts", "version": 1, "captions": 6091, "stages": 4, "source": …, "parameters": {…}, "hashes": {…}}
    {"concept": "dog", "stage": 1, "count": 1421, "degree": 83}
    {"concept": "hot dog", "stage": 3, "count": 22, "degree": 4}
    …

Concepts are in lower case, their words as WORD finds them, joined by a space; stages ascend, so that the concepts up to
a stage are the first so many. `count`: captions that hold the concept; `degree`: concepts it is connected with.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import fsspec
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from formats.errors import UserError
from formats.files import write_json_lines
from formats.word_counts import WORD

FORMAT, FORMAT_VERSION = "concepts", 1
MOST_WORDS = 4
_MAKE_IT = "make it with `data-prep concepts SHARDS --output concepts.jsonl`"


@dataclass(frozen=True)
class Concept:
    """One line of the file."""

    concept: str
    stage: int
    count: int
    degree: int


class Occurrence(NamedTuple):
    """Words `first` to `last` (exclusive) of a caption are the concept of this number."""

    first: int
    last: int
    number: int


class Concepts:
    """All concepts of a file, numbered in its order; there may be none, where words are taught otherwise.

    captions: that were counted; sha256: of the file, names it in a run's records
    """

    def __init__(self, concepts: Sequence[Concept], captions: int, sha256: str) -> None:
        self.concepts = tuple(concepts)
        self.captions = captions
        self.sha256 = sha256
        self._stages = [concept.stage for concept in self.concepts]
        self._numbers = {concept.concept: number for number, concept in enumerate(self.concepts)}
        self._longest = max((concept.concept.count(" ") for concept in self.concepts), default=0) + 1

    @property
    def num_stages(self) -> int:
        """The last stage."""
        return self._stages[-1] if self._stages else 1

    def up_to(self, stage: int) -> int:
        """How many concepts the stages up to this one have: they are the first."""
        return bisect.bisect_right(self._stages, stage)

    def occurrences(self, words: Sequence[str]) -> Iterator[Occurrence]:
        """Every concept among the lower-cased words of a caption, also those within others, from left to right."""
        for first in range(len(words)):
            for last in range(first + 1, min(first + self._longest, len(words)) + 1):
                number = self._numbers.get(" ".join(words[first:last]))
                if number is not None:
                    yield Occurrence(first, last, number)

    def named_in(self, caption: str) -> list[int]:
        """Numbers of the concepts that a caption holds, ascending, each once."""
        return sorted({found.number for found in self.occurrences(WORD.findall(caption.lower()))})


class _Header(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Literal["concepts"]
    version: Literal[1]
    captions: PositiveInt
    stages: PositiveInt


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    concept: str
    stage: PositiveInt
    count: PositiveInt
    degree: NonNegativeInt


_Parsed = TypeVar("_Parsed", bound=BaseModel)


def write_concepts(path: Path, concepts: Sequence[Concept], captions: int, made_by: Mapping[str, Any]) -> None:
    """Write the file, atomically; concepts ascend in stages. `made_by`: source, parameters, hashes, for the header."""
    stages = concepts[-1].stage
    header = {"format": FORMAT, "version": FORMAT_VERSION, "captions": captions, "stages": stages, **made_by}
    write_json_lines(path, [header, *map(asdict, concepts)])


def read_concepts(location: str) -> Concepts:
    """Read a concepts.jsonl, any fsspec URL; UserError if it is missing or is not what `data-prep concepts` writes."""
    try:
        with fsspec.open(location, "rb") as file:
            content: bytes = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot read concepts at {location} ({error}): {_MAKE_IT}") from error
    lines = content.splitlines()
    header = _parse(location, 1, lines[0] if lines else b"", _Header)
    concepts, known = list[Concept](), set[str]()
    for number, line in enumerate(lines[1:], start=2):
        concept = Concept(**_parse(location, number, line, _Line).model_dump())
        words = WORD.findall(concept.concept.lower())
        if concept.concept != " ".join(words) or not 1 <= len(words) <= MOST_WORDS:
            raise _not_concepts(location, number, f"{concept.concept!r} is not one to {MOST_WORDS} lower-case words")
        if concept.concept in known:
            raise _not_concepts(location, number, f"{concept.concept!r} comes a second time")
        if not (concepts[-1].stage if concepts else 1) <= concept.stage <= header.stages:
            raise _not_concepts(location, number, f"stage {concept.stage} is out of order")
        if concept.count > header.captions:
            raise _not_concepts(location, number, f"{concept.concept!r} is in more captions than there are")
        known.add(concept.concept)
        concepts.append(concept)
    if not concepts or concepts[-1].stage != header.stages:
        raise _not_concepts(location, len(lines), f"no concept of the last of {header.stages} stages")
    return Concepts(concepts, header.captions, hashlib.sha256(content).hexdigest())


def _parse(location: str, number: int, line: bytes, kind: type[_Parsed]) -> _Parsed:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _not_concepts(location, number, f"{where}: {first['msg']}".removeprefix(": ")) from None


def _not_concepts(location: str, number: int, reason: str) -> UserError:
    return UserError(f"{location}, line {number}: {' '.join(reason.split())}: not a file of concepts; {_MAKE_IT}")
