"""Any file of an evaluation set or of its output becomes something else: one line and exit 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_material import letter_model, retrieval_set, run_program, write_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import classification_set, write_composition_set

from formats.programs import exit_code_of
from pipeline import report
from pipeline.evaluation.results import Result, read_results
from pipeline.evaluation.tasks import intervals

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = letter_model()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WRITTEN = (JSON.map(json.dumps) | st.text(max_size=40)).map(str.encode) | st.binary(max_size=700)
CUT = st.integers(0, 1500).map(lambda left: lambda path: path.write_bytes(path.read_bytes()[:left]))


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_loop(path: Path) -> None:
    """It cannot be opened, not even by root."""
    path.unlink()
    path.symlink_to(path)


DAMAGE: st.SearchStrategy[Callable[[Path], object]] = st.one_of(
    WRITTEN.map(_write), CUT, st.sampled_from([os.unlink, _make_folder, _make_loop])
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three small sets under sets/, what evaluating them left under out/."""
    home = tmp_path_factory.mktemp("evaluated")
    images = write_noise(home)
    classification_set(home / "sets" / "animals", images)
    (home / "sets" / "animals" / "dataset.json").write_text('{"samples": 8}')
    (home / "sets" / "animals" / "dataset_type.txt").write_text("classification")
    retrieval_set(home / "sets" / "pictures", images)
    write_composition_set(home / "sets" / "crepe")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(intervals, "RESAMPLES", 10)
        assert run_program(monkeypatch, MODEL, *arguments(home)) == 0
        yield home


def arguments(home: Path) -> list[str]:
    sets = [str(home / "sets" / name) for name in ("animals", "pictures", "crepe")]
    return ["--data", *sets, "--output", str(home / "out"), "--batch-size", "3"]


def results_of(home: Path) -> list[Result]:
    return [replace(result, wall_time_s=None) for result in read_results(home / "out" / "results.jsonl")]


@contextmanager
def damaged(path: Path, damage: Callable[[Path], object]) -> Iterator[None]:
    content = path.read_bytes()
    damage(path)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(content)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), damage=DAMAGE)
def test_a_file_that_is_something_else(evaluated: Path, data: st.DataObject, damage: Callable[[Path], object]) -> None:
    files = sorted(path for path in evaluated.rglob("*") if path.is_file() and path.parent != evaluated)
    path = data.draw(st.sampled_from(files))
    before = results_of(evaluated)
    with damaged(path, damage), pytest.MonkeyPatch.context() as monkeypatch:
        said: list[str] = []
        monkeypatch.setattr("formats.programs._say", lambda text, code: said.append(text) or code)
        monkeypatch.setattr("traceback.print_exc", lambda: pytest.fail(f"a traceback for {path}"))
        for program in (
            lambda: run_program(monkeypatch, MODEL, *arguments(evaluated)),
            lambda: report.main(["collect", str(evaluated / "out")]),
        ):
            said.clear()
            assert exit_code_of(program) == (2 if said else 0)
            assert all("\n" not in text for text in said)
        if not said:
            assert [result.dataset for result in results_of(evaluated)] == [result.dataset for result in before]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_program(monkeypatch, MODEL, *arguments(evaluated)) == 0
    assert results_of(evaluated) == before
