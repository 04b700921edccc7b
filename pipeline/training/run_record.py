"""What a run directory says about itself: recipe.yaml, run.json; and whether a run may be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import read_json, write_atomically, write_json
from pipeline.recipe import Recipe
from pipeline.recipe_files import OPTIONS, read_recipe_file
from pipeline.recipe_options import Change

RECIPE, RECORD = "recipe.yaml", "run.json"


def write_record(run_directory: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """Write recipe.yaml and run.json (main rank)."""
    write_atomically(run_directory / RECIPE, recipe.to_yaml())
    write_json(run_directory / RECORD, record)


def read_record(run_directory: Path) -> dict[str, Any]:
    """run.json, empty if there is none."""
    path = run_directory / RECORD
    return read_json(path) if path.exists() else {}


def check_unchanged(
    run_directory: Path,
    recipe: Recipe,
    manifest_sha256: str,
    tokenizer_sha256: str,
    word_counts_sha256: str | None,
    balance_sha256: str | None = None,
    concepts_sha256: str | None = None,
) -> None:
    """Raise UserError if a run that is to be continued would become another one half way."""
    before = _flat(read_recipe_file(str(run_directory / RECIPE)))
    now = _flat(recipe)
    # these change neither what is learnt nor from which samples in which order (unless something goes wrong), though
    # batch and precision change the bits; all others are fixed for a run's life
    may_change = {name for name, option in OPTIONS.items() if Change.RESUME in option.changes}
    for key in sorted(before.keys() | now.keys()):
        if ".".join(key.split(".")[-2:]) not in may_change and before.get(key) != now.get(key):
            raise UserError(
                f"{run_directory} was started with {key}={before.get(key)}, now it is {now.get(key)}: change it back "
                "to continue that run, or choose another train.output"
            )
    record = read_record(run_directory)
    hashes = {"manifest_sha256": ("data", manifest_sha256), "tokenizer_sha256": ("tokenizer", tokenizer_sha256)}
    if word_counts_sha256:
        hashes["word_counts_sha256"] = ("word counts", word_counts_sha256)
    if concepts_sha256:
        hashes["concepts_sha256"] = ("concepts", concepts_sha256)
    if record.get("balance_sha256") != balance_sha256:  # runs of before there were balances had none
        was, now_is = (
            f"balance_sha256 {sha[:12]}…" if sha else "none" for sha in (record.get("balance_sha256"), balance_sha256)
        )
        raise UserError(
            f"{run_directory} was started with another data.balance ({was}, now {now_is}): give the same, or choose "
            "another train.output"
        )
    for name, (what, sha256) in hashes.items():
        if record.get(name, sha256) != sha256:
            raise UserError(
                f"{run_directory} was started with other {what} ({name} {record[name][:12]}…, now {sha256[:12]}…): "
                "give the same, or choose another train.output"
            )


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Every option that is used: `section.key`, or `stages.NAME.section.key` where the recipe has stages."""
    flat: dict[str, Any] = {"stages": [name for name, _ in recipe.by_stage()]}
    for stage, stage_recipe in recipe.by_stage():
        prefix = "" if stage is None else f"stages.{stage}."
        for section, fields in stage_recipe.model_dump(exclude={"stages"}).items():
            flat |= {f"{prefix}{section}.{name}": value for name, value in fields.items()}
    return flat
