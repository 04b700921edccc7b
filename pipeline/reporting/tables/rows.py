"""Checkpoints as rows: each its own, or one for several that nothing but the seed tells apart."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.recipe import Recipe
from pipeline.reporting.inputs import Checkpoint
from pipeline.reporting.runs import Cost


@dataclass(frozen=True)
class Entry:
    """A row to be, of one checkpoint or of one for each seed. cost: their mean, None unless that of all is known."""

    label: str
    note: str
    seeds: tuple[Checkpoint, ...]
    cost: Cost | None = None


def by_recipe(checkpoints: Sequence[Checkpoint]) -> list[Entry]:
    """Checkpoints of equal steps are one entry where their recipes differ in nothing but the seed."""
    groups: dict[str, dict[int, Checkpoint]] = {}
    alone: list[Checkpoint] = []
    for checkpoint in checkpoints:
        recipe = checkpoint.run and checkpoint.run.recipe
        if not recipe:
            alone.append(checkpoint)
            continue
        by_seed, seed = groups.setdefault(_recipe_key(checkpoint, recipe), {}), recipe.train.seed
        if seed in by_seed:
            alone.append(checkpoint)  # the same training by two names, or twice: no further seed
        else:
            by_seed[seed] = checkpoint
    return [_entry(list(by_seed.values())) for by_seed in groups.values()] + [_entry([one]) for one in alone]


def _recipe_key(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The same for checkpoints that only the seed tells apart."""
    fields = recipe.model_dump(mode="json", exclude={"train": {"seed", "output"}})
    return json.dumps([fields, checkpoint.step, checkpoint.is_averaged], sort_keys=True)


def _entry(seeds: Sequence[Checkpoint]) -> Entry:
    first = seeds[0]
    if len(seeds) == 1:
        return Entry(first.label, first.note, (first,), first.cost)
    costs = [seed.cost for seed in seeds if seed.cost]
    return Entry(
        label=_shared_label([seed.label for seed in seeds]),
        note=f"{first.note}, mean ± sd of {len(seeds)} seeds",
        seeds=tuple(seeds),
        cost=_mean_cost(costs) if len(costs) == len(seeds) else None,
    )


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.fmean(cost.wall_h for cost in costs), statistics.fmean(cost.device_h for cost in costs))


def _shared_label(labels: Sequence[str]) -> str:
    """How all labels begin, without "seed": `base` for `base_s0` and `base_s1`."""
    letters = itertools.takewhile(lambda some: len(set(some)) == 1, zip(*labels, strict=False))
    shared = "".join(some[0] for some in letters)
    return re.sub(r"(^|[\W_]+)(seed|s)?[\W_]*$", "", shared) or f"{labels[0]}, …"
