"""Which concepts are connected: by captions, by WordNet, by ConceptNet. Edges are pairs of numbers i < j, each once.

C concepts, E edges
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.concepts.counting import add_pairs
from formats.errors import UserError
from formats.word_counts import WORD

Edges = npt.NDArray[np.int64]  # [E, 2]


def npmi(together: float, first: float, second: float, captions: float) -> float:
    """Normalised pointwise mutual information of two things (Bouma 2009): 0 by chance, 1 if always together."""
    if together == captions:
        return 1.0
    return math.log(together * captions / (first * second)) / -math.log(together / captions)


def edges_of_captions(
    files: Sequence[Path], counts_C: npt.NDArray[np.int64], captions: int, min_npmi: float, min_together: int
) -> Edges:
    """Concepts that captions hold together more often than by chance; `files` are those of `count_pairs`."""
    found = [np.empty((0, 2), np.int64)]
    for first, together in add_pairs(files, len(counts_C)):
        row, column = np.nonzero(together >= max(1, min_together))
        count = together[row, column].astype(np.float64)
        expected = counts_C[row + first] * (counts_C[column] / captions)
        with np.errstate(divide="ignore", invalid="ignore"):
            information = np.log(count / expected) / -np.log(count / captions)
        information[count == captions] = 1.0
        is_edge = information >= min_npmi
        found.append(np.stack([row[is_edge] + first, column[is_edge]], axis=1))
    return np.concatenate(found)


def _as_edges(pairs: Iterable[tuple[int, int]]) -> Edges:
    edges = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
    return np.array(edges, np.int64).reshape(-1, 2)


# What WordNet's `morphy` takes off the end of a noun, and puts there, to find a form it knows.
_DETACHMENTS = [("s", ""), *((f"{end}es", end) for end in ("s", "x", "z", "ch", "sh")), ("men", "man"), ("ies", "y")]


def edges_of_wordnet(folder: Path, names: Sequence[str]) -> Edges:
    """Concepts whose commonest senses as nouns are one synset of WordNet, or two of which one points at the other.

    Of nouns, because verbs have so many senses that `is` and `go` would be connected with nearly everything.
    Raises UserError for a folder that lacks index.noun or data.noun.
    """
    index, exceptions = _read_index(_wordnet_file(folder, "index.noun")), _read_exceptions(folder / "noun.exc")
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        forms = (form for form in _base_forms(name.replace(" ", "_"), exceptions) if form in index)
        for offset in {index[form] for form in forms}:
            members.setdefault(offset, []).append(number)
    pairs = [pair for numbers in members.values() for pair in product(numbers, numbers)]
    for offset, pointers in _read_pointers(_wordnet_file(folder, "data.noun")):
        if offset in members:
            pairs += (pair for there in pointers for pair in product(members[offset], members.get(there, ())))
    return _as_edges(pairs)


def _wordnet_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} has no {name}: give the folder of WordNet's files (Debian: wordnet-base)")
    return path


def _lines_of_wordnet(path: Path) -> Iterator[list[str]]:
    """Fields of each line; the licence is at the top, behind spaces."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        yield from (line.split() for line in lines if not line.startswith("  "))


def _read_index(path: Path) -> dict[str, str]:
    """Offset of the commonest sense by lemma: lemma pos synsets pointers [pointer…] senses tagged offset…."""
    return {fields[0]: fields[6 + int(fields[3])] for fields in _lines_of_wordnet(path)}


def _read_exceptions(path: Path) -> dict[str, list[str]]:
    return {fields[0]: fields[1:] for fields in _lines_of_wordnet(path)} if path.is_file() else {}


def _base_forms(word: str, exceptions: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The word, its exceptions, and what is left when its ending goes: WordNet's `morphy`."""
    yield word
    yield from exceptions.get(word, ())
    for ending, instead in _DETACHMENTS:
        if word.endswith(ending) and len(word) > len(ending):
            yield word.removesuffix(ending) + instead


def _read_pointers(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(offset, nouns it points at): offset file pos words(hex) [word id]… pointers [symbol offset pos ends]… …."""
    for fields in _lines_of_wordnet(path):
        begin = 4 + 2 * int(fields[3], 16)
        pointers = [fields[begin + 1 + 4 * number :][:4] for number in range(int(fields[begin]))]
        yield fields[0], [offset for _, offset, pos, _ in pointers if pos == "n"]


def edges_of_conceptnet(file: Path, names: Sequence[str], language: str) -> tuple[Edges, int]:
    """Concepts that an assertion of ConceptNet connects, both in the language; and how many lines were none.

    file: its assertions, tab-separated, perhaps gzipped: uri, relation, start, end, facts
    """
    numbers = {name: number for number, name in enumerate(names)}
    pairs, malformed, known = set[tuple[int, int]](), 0, 0
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.split("\t")
                if len(fields) < 4 or not (fields[2].startswith("/") and fields[3].startswith("/")):
                    malformed += 1
                    continue
                known += 1
                start, end = (numbers.get(_term(uri, language)) for uri in fields[2:4])
                if start is not None and end is not None:
                    pairs.add((start, end))
    except (OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read ({error}): give ConceptNet's assertions, .csv or .csv.gz") from error
    if not known:
        raise UserError(f"{file} holds no assertion: give ConceptNet's file of tab-separated assertions")
    return _as_edges(pairs), malformed


def _term(uri: str, language: str) -> str:
    """`hot dog` of /c/en/hot_dog/n/wn/food; nothing of other languages and of addresses."""
    parts = uri.strip().split("/")
    if len(parts) < 4 or parts[1] != "c" or parts[2] != language:
        return ""
    return " ".join(WORD.findall(parts[3].replace("_", " ").lower()))


def degrees(edges: Edges, size: int) -> npt.NDArray[np.int64]:
    """How many concepts each is connected with."""
    return np.bincount(edges.ravel(), minlength=size)


def links_to(edges: Edges, chosen: Collection[int], size: int) -> npt.NDArray[np.int64]:
    """How many of the chosen concepts each is connected with."""
    is_chosen = np.zeros(size, bool)
    is_chosen[list(chosen)] = True
    first, second = edges.T
    to_chosen = np.concatenate([first[is_chosen[second]], second[is_chosen[first]]])
    return np.bincount(to_chosen, minlength=size)
