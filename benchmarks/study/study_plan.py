"""A study: arms that differ in masking alone, trained on the same pairs in the same order from the same weights.

The file of a study is YAML, perhaps a diff over another (`base`). `views` of an arm: `samples` sees as many pairs as
every other; `time` trains for as long as the baseline; `tail` sees as many, the last tenth of them unmasked at a tenth
of the learning rate. `further` are as `samples`, of the first seed alone, when all others are done.

An arm is sections of a recipe, or `parts`: shares of the run, each as another arm has it, from the second on at a tenth
of the learning rate where that arm does not name its own. `experiment` names one of experiments.py, at the ratio of the
arm's masks.
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


class Arm(BaseModel):
    """What sets one arm apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    masking: dict[str, Any] = {}
    model: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    concepts: dict[str, Any] = {}  # its file is within the folder of prepared data
    concept_stages_at: list[float] = []  # after which shares of its part stages 2, 3, … of concepts begin
    experiment: str | None = None
    parts: dict[str, float] = {}  # name of an arm: share of the run

    def sections(self, data: Path) -> dict[str, Any]:
        """Of the recipe."""
        file = {"file": str(data / self.concepts["file"])} if "file" in self.concepts else {}
        sections = {"masking": self.masking, "model": self.model, "optimizer": self.optimizer}
        return sections | {"concepts": self.concepts | file}


class Study(BaseModel):
    """What a study's file says; paths are within the folder of prepared data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    train: str
    tokenizer: str
    evaluation: list[str]  # sets, evaluated during training and at its end
    metrics: dict[str, str]  # name in tables: key in metrics.jsonl
    last: dict[str, str] = {}  # the same of figures that some parts have alone: the last value is kept
    pairs: int  # of a run at equal samples
    evaluations: int  # of a run, evenly spaced, the last at its end
    seeds: int
    first_seed: int = 0
    timed_as: str = ""  # the study whose times hold here too: the same arms on batches of the same shapes
    protocol: str = ""  # what was decided before the first run
    recipe: dict[str, Any]
    arms: dict[str, Arm]  # the first is the baseline
    views: dict[View, list[str]]  # which arms

    def to_yaml(self) -> str:
        """The whole study in one file, without a base."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

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
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        runs = [Run(arm, view, seed) for seed in seeds for view, arms in views.items() for arm in arms]
        return [*runs, *(Run(arm, "further", self.first_seed) for arm in self.views.get("further", []))]

    def timed_arms(self) -> list[str]:
        """Arms of the views, without those in parts: the times of a part are those of the arm it names."""
        wanted = {arm for arms in self.views.values() for arm in arms}
        parts = {part for arm in wanted for part in self.arms[arm].parts}
        return [arm for arm, settled in self.arms.items() if arm in wanted | parts and not settled.parts]

    def step_s(self, arm: str, timed: dict[str, float]) -> float | None:
        """Seconds of an arm's step, from those of the arms that were timed; None where it cannot be told."""
        parts = self.arms[arm].parts
        if not parts:
            return timed.get(arm)
        if not parts.keys() <= timed.keys():
            return None
        return sum(share * timed[part] for part, share in parts.items())


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
    return Study.model_validate(_read_fields(path))


def _read_fields(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(path.read_text())
    base = fields.pop("base", None)
    if base is None:
        return fields
    below = _read_fields(path.parent / base)
    return below | fields | {name: merged(below[name], fields.get(name, {})) for name in ("recipe", "arms")}


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
    fields = merged(
        study.recipe,
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
    parts = study.arms[run.arm].parts
    if run.view == "tail":
        parts = {run.arm: 1 - TAIL_SHARE, BASELINE: TAIL_SHARE}
    if not parts:
        return merged(fields, study.arms[run.arm].sections(data))
    return fields | _stages(study, parts, steps, fields["optimizer"]["lr"], data)


# What all stages of a recipe have in common.
_SHARED = ("file", "curriculum")


def _stages(study: Study, parts: dict[str, float], steps: int, lr: float, data: Path) -> dict[str, Any]:
    """Of a run in parts, with what its concepts share: the first takes the steps that rounding leaves."""
    lengths = [max(1, round(share * steps)) for share in parts.values()]
    lengths[0] += steps - sum(lengths)
    stages, concepts, begin = [], dict[str, Any](), 0
    for number, (arm, length) in enumerate(zip(parts, lengths, strict=True)):
        sections = study.arms[arm].sections(data)
        concepts |= {name: value for name, value in sections["concepts"].items() if name in _SHARED}
        if shares := study.arms[arm].concept_stages_at:
            concepts["boundaries"] = [(begin + round(share * length)) * study.batch for share in shares]
        sections["concepts"] = {name: value for name, value in sections["concepts"].items() if name not in _SHARED}
        if number:
            sections["optimizer"] = {"lr": lr * TAIL_LR_RATIO, "warmup_steps": 0} | sections["optimizer"]
        stages.append({"name": f"part{number + 1}", **sections, "train": {"max_steps": length}})
        begin += length
    return {"stages": stages} | ({"concepts": concepts} if concepts else {})
