"""The page of `data-prep concepts`: what each stage teaches, what of the captions that covers, and some of them."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.concepts.counting import captions_of
from data_prep.parallel import map_in_processes
from formats.concepts import Concepts
from formats.files import write_atomically
from formats.manifest import Manifest, Shard
from formats.pages import render

TEMPLATE = Path(__file__).parents[1] / "templates" / "concepts.html.j2"
SHOWN_CONCEPTS, SHOWN_CAPTIONS = 60, 20
# Captions are looked at in so many shards, spread over all.
_SHARDS = 100


def write_page(path: Path, directory: Path, concepts: Concepts, manifest: Manifest, processes: int) -> list[float]:
    """Write the page; returns, for each stage, the share of captions that name a concept of the stages so far."""
    step = -(-len(manifest.shards) // _SHARDS)
    shards = manifest.shards[::step]
    first_stages = Counter[int]()
    look = functools.partial(_first_stages, directory, concepts)
    for found in map_in_processes(look, shards, processes, limit=len(shards)):
        first_stages.update(found)
    captions = first_stages.total()
    coverage = [
        sum(count for first, count in first_stages.items() if first <= stage) / max(1, captions)
        for stage in range(1, concepts.num_stages + 1)
    ]
    examples = itertools.islice(captions_of(directory, shards[0]), SHOWN_CAPTIONS)
    content = {
        "name": directory.resolve().name,
        "captions": concepts.captions,
        "looked_at": captions,
        "stages": [_stage(concepts, stage, coverage[stage - 1]) for stage in range(1, concepts.num_stages + 1)],
        "examples": [_marked(concepts, words) for words in examples],
    }
    write_atomically(path, render(TEMPLATE, content))
    return coverage


def _first_stages(directory: Path, concepts: Concepts, shard: Shard) -> Counter[int]:
    """Captions by the first stage that has a concept of theirs; those that name none in the stage after the last."""
    none = concepts.num_stages + 1
    return Counter(
        min((concepts.concepts[found.number].stage for found in concepts.occurrences(words)), default=none)
        for words in captions_of(directory, shard)
    )


def _stage(concepts: Concepts, stage: int, coverage: float) -> dict[str, Any]:
    own = concepts.concepts[concepts.up_to(stage - 1) : concepts.up_to(stage)]
    return {"number": stage, "concepts": len(own), "coverage": coverage, "examples": own[:SHOWN_CONCEPTS]}


def _marked(concepts: Concepts, words: Sequence[str]) -> list[tuple[str, int]]:
    """Words of a caption, each with the earliest stage of the concepts that it is in, 0 for none."""
    stages = [0] * len(words)
    for found in concepts.occurrences(words):
        stage = concepts.concepts[found.number].stage
        for place in range(found.first, found.last):
            stages[place] = min(stages[place] or stage, stage)
    return list(zip(words, stages, strict=True))
