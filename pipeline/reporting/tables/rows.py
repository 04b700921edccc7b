"""Results as rows: one per checkpoint, or one per recipe where several seeds of it were run."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluation.results import Result
from pipeline.recipe import Recipe
from pipeline.reporting.inputs import Cost, Run, cost_of, run_of
from pipeline.training.checkpoints.checkpoint import AVERAGED_WEIGHTS


@dataclass(frozen=True)
class Entry:
    """A row to be: the results of one checkpoint, or of one for each seed."""

    label: str
    note: str
    seeds: tuple[tuple[Result, ...], ...]
    cost: Cost | None = None


def by_checkpoint(results: Sequence[Result], runs: Sequence[Run] = ()) -> list[Entry]:
    """An entry per checkpoint, in the order of the results."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.model, result.checkpoint), []).append(result)
    return [
        Entry(row_label(group[0]), row_note(group[0]), (tuple(group),), cost_of(group[0], runs))
        for group in groups.values()
    ]


def by_recipe(results: Sequence[Result], runs: Sequence[Run]) -> list[Entry]:
    """The same, with checkpoints of equal steps in one entry where their recipes differ in nothing but the seed."""
    groups: dict[str, dict[int, Entry]] = {}
    alone: list[Entry] = []
    for entry in by_checkpoint(results, runs):
        run = run_of(entry.seeds[0][0], runs)
        if run is None or run.recipe is None:
            alone.append(entry)
            continue
        by_seed, seed = groups.setdefault(_recipe_key(entry, run.recipe), {}), run.recipe.train.seed
        if seed in by_seed:
            alone.append(entry)  # the same training by two names, or twice: no further seed
        else:
            by_seed[seed] = entry
    return [_merge(list(by_seed.values())) for by_seed in groups.values()] + alone


def row_label(result: Result) -> str:
    """What a result's row is called."""
    return checkpoint_label(result.checkpoint) or result.model


def checkpoint_label(checkpoint: str) -> str:
    """The run's name, from RUN/checkpoints/step_N, else the checkpoint's own."""
    parts = Path(checkpoint).parts
    if "checkpoints" in parts[1:]:
        run = parts[parts.index("checkpoints", 1) - 1]
        return f"{run}, averaged weights" if parts[-1] == AVERAGED_WEIGHTS else run
    return parts[-1] if parts else ""


def row_note(result: Result) -> str:
    """The model and the step."""
    return result.model if result.step is None else f"{result.model}, step {result.step:,}"


def _recipe_key(entry: Entry, recipe: Recipe) -> str:
    """The same for checkpoints that only the seed tells apart."""
    first = entry.seeds[0][0]
    fields = recipe.model_dump(mode="json", exclude={"train": {"seed", "output"}})
    # the kind of weights counts too: RUN/checkpoints/step_N or its averaged_weights
    return json.dumps([fields, first.step, Path(first.checkpoint).name == AVERAGED_WEIGHTS], sort_keys=True)


def _merge(entries: Sequence[Entry]) -> Entry:
    if len(entries) == 1:
        return entries[0]
    labels = [entry.label for entry in entries]
    shared = [
        letters[0] for letters in itertools.takewhile(lambda some: len(set(some)) == 1, zip(*labels, strict=False))
    ]
    common = re.sub(r"[\W_]+(seed|s)?[\W_]*$", "", "".join(shared))
    costs = [entry.cost for entry in entries if entry.cost]
    return Entry(
        label=common or f"{labels[0]}, …",
        note=f"{entries[0].note}, mean ± sd of {len(entries)} seeds",
        seeds=tuple(entry.seeds[0] for entry in entries),
        cost=Cost(statistics.fmean(c.wall_h for c in costs), statistics.fmean(c.device_h for c in costs))
        if costs
        else None,
    )
