"""What an earlier version wrote (tests/fixtures/make_4369668.py) is read, resumed and evaluated as by that one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import RANK_ENVIRONMENT, ROOT

from data_prep.__main__ import main as data_prep
from formats.errors import UserError
from pipeline import evaluate, export, report, train

FIXTURES = ROOT / "tests" / "fixtures"
EARLIER = FIXTURES / "commit_4369668"
sys.path.append(str(FIXTURES))

from make_4369668 import STEPS, add_smallest_model, recipe_options  # noqa: E402


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in whose folder the programs work: paths in its files are relative."""
    folder = tmp_path / "earlier"
    shutil.copytree(EARLIER, folder)
    monkeypatch.chdir(folder)
    for name, value in RANK_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    add_smallest_model()
    return folder


def test_its_shards_verify_and_its_run_goes_on_to_the_losses_it_had(earlier: Path) -> None:
    """The same pictures, captions, masks, weights and state of the optimizer, or the losses would differ."""
    expected = [line["loss"] for line in json_lines(Path("run/metrics.jsonl"))]
    assert len(expected) == STEPS
    tars = {path: path.read_bytes() for path in Path("shards").glob("*.tar")}
    assert data_prep(["verify", "shards", "--processes", "1"]) == 0
    assert {path: path.read_bytes() for path in Path("shards").glob("*.tar")} == tars
    assert train.main(recipe_options()) == 0
    lines = json_lines(Path("run/metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-4)


def test_its_checkpoint_is_evaluated_to_its_result(earlier: Path) -> None:
    assert evaluate.main(["--checkpoint", "run", "--data", "set", "--output", "again"]) == 0
    (old,), (new,) = json_lines(Path("run/evaluation/results.jsonl")), json_lines(Path("again/results.jsonl"))
    for name in ("model", "dataset", "task", "metrics", "samples", "chance", "weights_sha256", "step", "samples_seen"):
        assert new[name] == old[name], name


def test_its_results_make_a_report(earlier: Path) -> None:
    assert report.main(["run", "--output", "report"]) == 0
    page = Path("report/report.md").read_text()
    assert "ViT-fixture-8" in page
    assert f"{100 * json_lines(Path('run/evaluation/results.jsonl'))[0]['metrics']['acc1']:.1f}" in page


def test_its_checkpoint_is_read_for_export(earlier: Path) -> None:
    """As far as that version went: captions in its tokenizer are none for models of others."""
    with pytest.raises(UserError, match="trained with a SentencePiece tokenizer"):
        export.main(["run", "--format", "open_clip", "--output", "exported"])
