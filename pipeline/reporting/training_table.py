"""How each run was trained and what became of it: a column per run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from model.config import config_from_name
from pipeline.recipe import Recipe
from pipeline.reporting.report_inputs import Run
from pipeline.reporting.run_cost import cost_at, device_hours_label
from pipeline.reporting.table import Cell, Column, Row, Table, distinct
from pipeline.training.observing.run_logger import format_duration


def training_table(runs: Sequence[Run]) -> Table | None:
    """How each run was trained: a column per run; None without runs."""
    if not runs:
        return None
    facts = [_training_facts(run) for run in runs]
    labels = distinct(label for fact in facts for label in fact)
    rows = tuple(Row(label, tuple(Cell(fact.get(label, "")) for fact in facts)) for label in labels)
    return Table("training", "Training", "", tuple(Column(run.name) for run in runs), rows, corner="")


def _training_facts(run: Run) -> dict[str, str]:
    facts: dict[str, str] = {}
    if run.recipe:
        stages = run.recipe.by_stage()
        recipes = [recipe for _, recipe in stages]
        facts["model"] = run.recipe.model.name
        if run.recipe.stages:
            facts["stages"] = "; ".join(str(name) for name, _ in stages)
            facts["images"] = _by_stage(str(_image_size(recipe)) for recipe in recipes) + " px"
        facts["masking"] = _by_stage(_masking(recipe) for recipe in recipes)
        facts["batch"] = _by_stage(f"{recipe.train.global_batch_size:,}" for recipe in recipes) + " pairs"
        facts["learning rate"] = _by_stage(f"{recipe.optimizer.lr:g}" for recipe in recipes)
        facts["weight decay"] = _by_stage(f"{recipe.optimizer.weight_decay:g}" for recipe in recipes)
        facts["seed"] = str(run.recipe.train.seed)
    if run.steps:
        last = run.steps[-1]
        facts["steps"] = f"{last['step']:,}"
        if "samples_seen" in last:
            facts["samples seen"] = f"{last['samples_seen']:,}"
        if "epoch" in last:
            facts["epochs"] = f"{last['epoch']:.2f}"
        if "wall_time_s" in last:
            facts["wall time"] = format_duration(last["wall_time_s"])
        if cost := cost_at(run, last["step"]):
            facts[device_hours_label([run])] = f"{cost.device_h:.3g} on {run.world_size}"
        for metric, label in (("samples_per_s", "samples/s, median"), ("tokens_per_s", "tokens/s, median")):
            curves = [stage.curve(metric)[1] for stage in run.by_stage()]
            if any(curves):
                facts[label] = _by_stage(f"{statistics.median(values):,.0f}" for values in curves if values)
        if losses := run.by_stage()[-1].curve("loss")[1]:
            final = losses[-max(1, len(losses) // 20) :]
            facts["loss, last 5 % of the log"] = f"{statistics.fmean(final):.3f}"
    return facts


def _by_stage(facts: Iterable[str]) -> str:
    """One fact if all stages share it, else one for each."""
    each = list(facts)
    return each[0] if len(set(each)) == 1 else "; ".join(each)


def _masking(recipe: Recipe) -> str:
    masking = recipe.masking
    return masking.strategy if masking.strategy == "none" else f"{masking.strategy}, {masking.target_mask_ratio:.0%}"


def _image_size(recipe: Recipe) -> int:
    return recipe.model.image_size or config_from_name(recipe.model.name).vision.image_size
