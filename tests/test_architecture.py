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
