"""A study: arms that differ in masking alone, trained on the same pairs in the same order from the same weights.

The file of a study is YAML. `views` of an arm: `samples` sees as many pairs as every other; `time` trains for as long
as the baseline; `tail` sees as many, the last tenth of them unmasked at a tenth of the learning rate. `further` are
as `samples`, of the first seed alone, when all others are done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

BASELINE = "none"
View = Literal["samples", "time", "tail", "further"]
TAIL_SHARE, TAIL_LR_RATIO = 0.1, 0.1


class Study(BaseModel):
    """What a study's file says; paths are within the folder of prepared data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    train: str
    tokenizer: str
    evaluation: list[str]  # sets, evaluated during training and at its end
    metrics: dict[str, str]  # name in tables: key in metrics.jsonl
    pairs: int  # of a run at equal samples
    evaluations: int  # of a run, evenly spaced, the last at its end
    seeds: int
    recipe: dict[str, Any]
    arms: dict[str, dict[str, Any]]  # sections of the recipe; the first is the baseline
    views: dict[View, list[str]]  # which arms

    @property
    def batch(self) -> int:
        """Pairs of a step."""
        return int(self.recipe["train"]["global_batch_size"])

    def steps(self, share: float = 1.0) -> int:
        """Steps of a run that sees `share` times the pairs, a multiple of `evaluations`."""
        return max(1, round(self.pairs * share / self.batch / self.evaluations)) * self.evaluations

    def runs(self) -> list[Run]:
        """All runs: every seed once before any a second time, so that what is not reached is balanced."""
        views = {view: arms for view, arms in self.views.items() if view != "further"}
        runs = [Run(arm, view, seed) for seed in range(self.seeds) for view, arms in views.items() for arm in arms]
        return [*runs, *(Run(arm, "further", 0) for arm in self.views.get("further", []))]


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: str
    view: View
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.arm.replace(' ', '_')}-{self.view}-{self.seed}"


def read_study(path: Path) -> Study:
    """Raises pydantic's ValidationError for a file that is no study."""
    return Study.model_validate(yaml.safe_load(path.read_text()))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, `above` winning."""
    result = dict(below)
    for key, value in above.items():
        result[key] = merged(result[key], value) if isinstance(result.get(key), dict) else value
    return result


def recipe_of(study: Study, run: Run, share: float, data: Path, output: Path) -> dict[str, Any]:
    """The recipe of a run that sees `share` times the study's pairs."""
    steps = study.steps(share)
    every = steps // study.evaluations
    fields = merged(study.recipe, study.arms[run.arm])
    fields = merged(
        fields,
        {
            "data": {"train": str(data / study.train), "tokenizer": str(data / study.tokenizer)},
            "evaluation": {"data": [str(data / name) for name in study.evaluation], "every_steps": every},
            "train": {
                "output": str(output),
                "seed": run.seed,
                "max_steps": steps,
                "log_every_steps": max(1, every // 4),
                "save_every_steps": steps,
            },
            "optimizer": {"warmup_steps": steps // 10},
        },
    )
    if run.view == "tail":
        tail = max(1, round(TAIL_SHARE * steps))
        rate = {"lr": fields["optimizer"]["lr"] * TAIL_LR_RATIO, "warmup_steps": 0}
        fields["stages"] = [
            {"name": "masked", "train": {"max_steps": steps - tail}},
            {"name": "whole", "masking": {"strategy": "none"}, "optimizer": rate, "train": {"max_steps": tail}},
        ]
    return fields
