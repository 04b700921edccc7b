"""docs/reproduce.md: its tables are those of the record, the record is what the planner says, its commands exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from data_prep.__main__ import make_parser
from pipeline.evaluation.sets.known import set_key
from pipeline.recipe_files import RECIPES_DIRECTORY, load_recipe
from pipeline.reporting.tables.papers import RETRIEVAL, ROBUSTNESS, ZERO_SHOT, read_published

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/reproduce.md").read_text()
# Programs whose options are a recipe's as well.
TAKE_OVERRIDES = ("train", "plan", "bench_data")


def commands() -> list[str]:
    """Command lines of the page, long ones put together, with the commands of the tables."""
    blocks = re.sub(r"\\\n\s*", "", PAGE)
    lines = [line.strip() for line in re.findall(r"^ {4,}\S.*$", blocks, re.MULTILINE)]
    return [*lines, *re.findall(r"`(RECIPE=[^`]*)`", PAGE)]


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("full_size_plans")


def test_the_tables_are_those_of_the_record(plans: ModuleType) -> None:
    figures = plans.recorded()
    doc_tables = importlib.import_module("doc_tables")
    assert doc_tables.marked(plans.TABLES, plans.tables(figures, read_published())) in PAGE


def test_the_record_is_what_the_planner_says(plans: ModuleType) -> None:
    assert plans.plan_all() == plans.recorded(), "run python benchmarks/full_size_plans.py"


def test_every_recipe_fits(plans: ModuleType) -> None:
    assert {name for name, planned in plans.recorded()["recipes"].items() if not planned["fits"]} == set()


def test_a_shell_can_read_it() -> None:
    checked = subprocess.run(["bash", "-n"], input="\n".join(commands()), capture_output=True, text=True, check=False)
    assert checked.stderr == ""


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("data-prep ")])
def test_data_prep_takes_its_options(line: str) -> None:
    make_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize(
    "line", [line for line in commands() if re.match(r"(python|deepspeed) pipeline/|bench-data", line)]
)
def test_programs_take_their_options(line: str) -> None:
    words = shlex.split(line)
    name = "bench_data" if words[0] == "bench-data" else Path(words[1]).stem
    arguments = words[1:] if words[0] == "bench-data" else words[2:]
    parser = importlib.import_module(f"pipeline.{name}")._parser()
    options = parser.parse_intermixed_args(arguments)
    if name in TAKE_OVERRIDES:
        load_recipe(options.recipe, options.overrides)


@pytest.mark.parametrize("line", [line for line in commands() if "sbatch" in line or "submit.sh" in line])
def test_jobs_have_their_settings(line: str) -> None:
    settings = dict(word.split("=", 1) for word in shlex.split(line) if re.match(r"[A-Z_]+=", word))
    known = re.findall(r"^([A-Z_]+)=", (ROOT / "slurm/env.sh").read_text(), re.MULTILINE)
    assert set(settings) <= set(known)
    recipe = re.sub(r"\$\w+", "*", settings.get("RECIPE", "base"))
    assert any(fnmatch(file.stem, recipe) for file in RECIPES_DIRECTORY.glob("*.yaml"))
    assert all((ROOT / file).exists() for file in re.findall(r"slurm/\S+|examples/\S+", line))


def test_the_sets_fill_the_published_tables() -> None:
    names = re.search(r"for name in (food101[^;]*);", re.sub(r"\\\n\s*", "", PAGE))
    assert names
    sets = {set_key(name) for name in names[1].split()}
    for group in (ZERO_SHOT, RETRIEVAL, ROBUSTNESS):
        assert [measure.label for measure in group.measures if not sets & set(measure.sets)] == []
