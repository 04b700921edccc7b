"""Which n-grams are concepts, and the stage in which each is taught."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from data_prep.concepts.graphs import Edges, degrees, links_to, npmi
from formats.concepts import Concept

# Of the first stage's concepts so many times are frequent enough to be among them.
_FREQUENT = 2


def choose_concepts(counts: Mapping[str, int], captions: int, min_together: float, most: int) -> list[str]:
    """Words, and runs of words that belong together, the most frequent first, `most` at most.

    A run belongs together if, cut anywhere, its two parts have an NPMI of at least `min_together`; one that is always
    part of the same longer run is left out.
    """
    whole = [ngram for ngram in counts if _is_whole(ngram, counts, captions, min_together)]
    parts = {part for ngram in whole for part in _shorter_by_one(ngram) if counts[part] == counts[ngram]}
    chosen = [ngram for ngram in whole if " " not in ngram or ngram not in parts]
    return sorted(chosen, key=lambda ngram: (-counts[ngram], ngram))[:most]


def _is_whole(ngram: str, counts: Mapping[str, int], captions: int, min_together: float) -> bool:
    words = ngram.split(" ")
    cuts = ((" ".join(words[:place]), " ".join(words[place:])) for place in range(1, len(words)))
    # what holds the whole holds the parts: they are counted where it is
    return all(npmi(counts[ngram], counts[head], counts[tail], captions) >= min_together for head, tail in cuts)


def _shorter_by_one(ngram: str) -> Sequence[str]:
    """What is left of a run without its first or its last word."""
    return (ngram.partition(" ")[2], ngram.rpartition(" ")[0]) if " " in ngram else ()


def assign_stages(
    names: Sequence[str], counts: Mapping[str, int], edges: Edges, num_stages: int, first_share: float
) -> list[Concept]:
    """Concepts in the order of their stages, the best connected of a stage first.

    Stage 1: `first_share` of all, those with the most connections among the frequent ones, which are twice as many;
    each next one what is connected with those before, by most connections first, until the concepts so far have grown
    by the factor that they grow by in every stage; the last one the rest. A stage to which nothing is left is none.
    """
    size = len(names)
    degree = degrees(edges, size).tolist()
    by_count = sorted(range(size), key=lambda i: (-counts[names[i]], names[i]))
    num_first = max(1, math.ceil(first_share * size))
    by_degree = sorted(by_count[: _FREQUENT * num_first], key=lambda i: (-degree[i], -counts[names[i]], names[i]))
    stages = [by_degree[:num_first]]
    placed = set(stages[0])
    for stage in range(2, num_stages):
        most = round(num_first * (size / num_first) ** ((stage - 1) / (num_stages - 1))) - len(placed)
        links = links_to(edges, placed, size).tolist()
        near = [i for i in range(size) if links[i] and i not in placed]
        stages.append(sorted(near, key=lambda i: (-links[i], -counts[names[i]], names[i]))[:most])
        placed.update(stages[-1])
    stages.append([i for i in range(size) if i not in placed])
    concepts = []
    for stage, numbers in enumerate(filter(None, stages), start=1):
        for i in sorted(numbers, key=lambda i: (-degree[i], -counts[names[i]], names[i])):
            concepts.append(Concept(names[i], stage, counts[names[i]], degree[i]))
    return concepts
