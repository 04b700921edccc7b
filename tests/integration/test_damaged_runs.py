"""Any file of a run directory replaced by something else: one line and exit code 2, or it goes on; no other is lost."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from plain_user import outcome
from test_earlier_files import EARLIER, add_smallest_model, recipe_options

from pipeline import evaluate, report, train

FILES = sorted(str(path.relative_to(EARLIER)) for path in (EARLIER / "run").rglob("*") if path.is_file())
CONTENTS = {
    "empty": b"",
    "other object": b'{"step": "x", "files": 3, "recipe": [], "model": {"name": 1}}\n',
    "list": b"[1, 2]\n",
    "null": b"null\n",
    "number": b"1e999\n",
    "deep": b"[" * 100_000,
    "text": b"nothing to see here: {\n",
    "bytes": bytes(range(256)) * 8,
    "not UTF-8": b"caf\xe9: 1\n",
}
KINDS = (*CONTENTS, "folder", "unreadable", "cut")
PROGRAMS: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
    "train": (train.main, recipe_options()),
    "evaluate": (evaluate.main, ["--checkpoint", "run", "--data", "set", "--output", "run/evaluation"]),
    "report": (report.main, ["run", "--output", "report"]),
}
RESULTS = "run/evaluation/results.jsonl"
TRIALS = int(os.environ.get("CLUSTER_CLIP_TRIALS", "3"))  # of some 150, for each program
SEED = int(os.environ.get("CLUSTER_CLIP_SEED", "1"))


def replace(path: Path, kind: str) -> None:
    """Put something else in a file's place."""
    if kind == "unreadable":
        path.chmod(0)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(CONTENTS[kind])


def others(folder: Path, but: str) -> dict[str, bytes]:
    """What must still be there, whatever was refused."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {name: path.read_bytes() for path in files if (name := str(path.relative_to(folder))) != but}


def check(program: str, file: str, kind: str, folder: Path, log: Path) -> None:
    """Run a program beside the damage."""
    main, arguments = PROGRAMS[program]
    replace(folder / file, kind)
    before = others(folder, file)
    code, said = outcome(main, arguments, log)
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert "Traceback" not in said, said[-2000:]
    assert (code, len(errors)) in ((0, 0), (2, 1)), said[-2000:]
    if code == 2:
        after = others(folder, file)
        results = {RESULTS: after[RESULTS]} if RESULTS in before else {}  # may hold a result more
        assert {name: after.get(name) for name in before} == before | results


@pytest.mark.parametrize("program", PROGRAMS)
def test_damage_is_one_line_or_none(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_smallest_model()
    draw = random.Random(f"{SEED} {program}")
    for number in range(TRIALS):
        file, kind = draw.choice(FILES), draw.choice(KINDS)
        print(f"{file}: {kind}")
        folder = tmp_path / str(number)
        shutil.copytree(EARLIER, folder)
        monkeypatch.chdir(folder)
        check(program, file, kind, folder, tmp_path / "log")
