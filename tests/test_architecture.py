"""The direction of imports, and names in pipeline/ that would replace other modules when it is first on sys.path."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST_PARTY = {"model", "formats", "data_prep", "pipeline"}
MAY_IMPORT = {
    "model": {"model"},
    "formats": {"formats"},
    "data_prep": {"data_prep", "formats"},
    "pipeline": {"pipeline", "model", "formats"},
}
NEVER = {
    "formats": {"torch", "deepspeed", "img2dataset", "aiohttp"},
    "data_prep": {"torch", "deepspeed"},
    "pipeline": {"img2dataset"},
}


def imported_packages(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield node.module.split(".")[0]


def violations(package: str, source: str) -> set[str]:
    found = set(imported_packages(source))
    if package == "model":
        # a CUDA torch brings triton along; model.loss works without
        return found - {"model", "torch", "triton", "__future__"} - set(sys.stdlib_module_names)
    return (found & FIRST_PARTY) - MAY_IMPORT[package] | found & NEVER[package]


@pytest.mark.parametrize("package", sorted(FIRST_PARTY))
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    wrong = {str(path): violations(package, path.read_text()) for path in files}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_import_check_notices() -> None:
    assert violations("model", "import numpy") == {"numpy"}
    assert violations("data_prep", "def f():\n    from torch import nn") == {"torch"}
    assert violations("pipeline", "from data_prep.shards.verify import verify") == {"data_prep"}


def test_no_two_test_modules_share_a_name() -> None:
    """pytest imports them by name alone, and would take one for the other."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# A room is a module or folder of a package. Each may import those before it, and nothing behind it.
ROOMS = {
    "formats": (
        "errors files locks owners tar editions manifest arrays embeddings clusters balance pictures texts word_counts "
        "concepts charts pages programs"
    ),
    "model": (
        "config packing attention transformer kernels loss heads masking towers class_attention clip masked_words "
        "flops open_clip_weights transformers_weights"
    ),
    "data_prep": (
        "boxes console folders parallel shards synthetic tables lists packing tokens near balancing concepts web "
        "editions forget build commands __main__"
    ),
    "pipeline": (
        "versions hardware recipe_options recipe recipe_files ranks data foreign evaluation image_sources training "
        "inference planning reporting bench_data mask_preview plan train evaluate embed report export"
    ),
}


def first_party_imports() -> dict[str, set[str]]:
    """The project's modules, by their dotted names, and which of them each imports, anywhere in its text."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in FIRST_PARTY
        for path in (ROOT / package).rglob("*.py")
    }
    return {name: set(modules_in(path.read_text())) & files.keys() - {name} for name, path in files.items()}


def modules_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports within a package that run from a room to one behind it, and rooms that are not in the list."""
    found = []
    for name, imported in imports.items():
        for other in {name, *imported}:
            (package, *rest), (of, *others) = name.split("."), other.split(".")
            if package != of or not rest or not others:
                continue
            order = ROOMS[package].split()
            if others[0] not in order:
                found.append(f"{other}: in no room")
            elif rest[0] in order and order.index(rest[0]) < order.index(others[0]):
                found.append(f"{name} -> {other}")
    return sorted(set(found))


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others: what stays when all that import nothing are taken away."""
    left = {name: set(imported) for name, imported in imports.items()}
    while ends := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in ends:
            del left[name]
    imported_somewhere = set().union(*left.values())
    return sorted(name for name in left if name in imported_somewhere)


def test_no_import_runs_upward() -> None:
    assert upward(first_party_imports()) == []


def test_no_files_import_each_other() -> None:
    assert circles(first_party_imports()) == []


def test_the_trainer_imports_few_of_the_others() -> None:
    modules = first_party_imports()
    assert len([name for name in modules["pipeline.training.trainer"] if "." in name]) <= 20


def test_upward_imports_and_circles_are_noticed() -> None:
    assert upward({"pipeline.data.a": {"pipeline.evaluation.b"}}) == ["pipeline.data.a -> pipeline.evaluation.b"]
    assert upward({"pipeline.evaluation.b": {"pipeline.data.a", "model.clip"}}) == []
    assert upward({"pipeline.attic.a": set()}) == ["pipeline.attic.a: in no room"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_module_of_pipeline_shadows_another() -> None:
    installed = set(importlib.metadata.packages_distributions()) - FIRST_PARTY
    taken = installed | set(sys.stdlib_module_names) | {"model", "data_prep"}
    assert "json" in taken
    assert "torch" in taken
    own = {path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert own & taken - {"__init__", "__pycache__"} == set()


def test_three_modules_know_deepspeed() -> None:
    """Others may name the engine's type, for the type checker alone."""
    users = {
        path.name
        for path in (ROOT / "pipeline").rglob("*.py")
        if "deepspeed" in set(imported_packages(without_typing_imports(path.read_text())))
    }
    assert users == {"engine.py", "fragments.py", "template.py"}


def without_typing_imports(source: str) -> str:
    """A module without its `if TYPE_CHECKING:` blocks."""
    tree = ast.parse(source)
    for_types = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    tree.body = [node for node in tree.body if node not in for_types]
    return ast.unparse(tree)
