"""An evaluation in slices, on ranks, in any order, is the evaluation; what is missing is named."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
from evaluation_material import CPU, encoder_of, letter_model, retrieval_set, run_program, write_noise
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import UserError
from pipeline import report
from pipeline.evaluation.features import consecutive
from pipeline.evaluation.jobs import Slice, encode_slice, job_files, make_job
from pipeline.evaluation.sets.files import ImageFile
from pipeline.evaluation.sets.layouts import open_evaluation_set
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return letter_model()


@pytest.fixture
def images(tmp_path: Path) -> list[ImageFile]:
    return write_noise(tmp_path)


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 4))
def test_shares_of_slices_and_ranks_follow_one_another(total: int, count: int, world_size: int) -> None:
    shares = [
        Slice(index, count).share(total, Ranks(rank, rank, world_size, CPU))
        for index in range(count)
        for rank in range(world_size)
    ]
    assert [item for share in shares for item in share] == list(range(total))


@given(st.sets(st.integers(0, 60)), st.integers(1, 5))
def test_consecutive_numbers_become_ranges(numbers: set[int], longest: int) -> None:
    ranges = list(consecutive(sorted(numbers), longest))
    assert [number for part in ranges for number in part] == sorted(numbers)
    assert all(0 < len(part) <= longest for part in ranges)


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "1/0"])
def test_slices_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no slice"):
        Slice.parse(text)


def measured(line: str) -> str:
    return json.dumps({name: value for name, value in json.loads(line).items() if name != "wall_time_s"})


@pytest.mark.slow
def test_any_slicing_gives_the_same_bytes(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], capsys: pytest.CaptureFixture[str]
) -> None:
    data = retrieval_set(tmp_path / "pictures", images)
    rng = random.Random(5)
    outcomes = set()
    for trial in range(100):
        output = tmp_path / f"out{trial}"
        job = make_job(model.identity, data, open_evaluation_set(data), None, batch_size=2, masking=None)
        count = rng.randint(1, 6)
        world_size = rng.randint(1, 3)
        order = [(index, rank) for index in range(count) for rank in range(world_size)]
        rng.shuffle(order)
        for index, rank in order:
            encode_slice(job, encoder_of(model, rank, world_size), Slice(index, count), output)
        assert report.main(["collect", str(output)]) == 0
        (line,) = (output / "results.jsonl").read_text().splitlines()
        outcomes.add(measured(line))
    assert len(outcomes) == 1
    capsys.readouterr()


def test_collecting_too_early_names_what_is_missing(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = retrieval_set(tmp_path / "pictures", images), tmp_path / "out"
    arguments = ("--data", str(data), "--output", str(output), "--batch-size", "2")
    with pytest.raises(UserError, match="nothing to collect"):
        report.main(["collect", str(output)])
    assert run_program(monkeypatch, model, *arguments, "--slice", "0/3") == 0
    assert run_program(monkeypatch, model, *arguments, "--slice", "2/3") == 0
    with pytest.raises(UserError, match=r"2 of 8 images of pictures .*rows 2 to 3.* not ended: 1/3; run .*--slice 1/3"):
        report.main(["collect", str(output)])
    assert not (output / "results.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    # without --slice the rest is encoded, and what was there is used
    assert run_program(monkeypatch, model, *arguments) == 0
    assert before.items() < {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}.items()
    assert len((output / "results.jsonl").read_text().splitlines()) == 1


def test_collecting_looks_at_the_set_again(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = retrieval_set(tmp_path / "pictures", images), tmp_path / "out"
    arguments = ("--data", str(data), "--output", str(output), "--batch-size", "2")
    assert run_program(monkeypatch, model, *arguments, "--slice", "0/1") == 0
    (data / "test" / "1.tar").unlink()
    with pytest.raises(UserError, match=r"missing shard .*1\.tar"):
        report.main(["collect", str(output)])
    (data / "test" / "nshards.txt").write_text("1\n")
    with pytest.raises(UserError, match="have no features yet"):  # of the set as it is now
        report.main(["collect", str(output)])
    assert len(job_files(output)) == 1
