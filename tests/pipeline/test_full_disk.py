"""A disk that fills up while a run writes its side files: one warning, whole lines, all of them once there is room."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.faults.guard import BadSamples, Fault, FaultLog, StepOutcome
from pipeline.training.observing.run_logger import Curves, RunLogger
from pipeline.training.observing.step_observer import ProfileWindow
from pipeline.training.side_files import LineFile
from pipeline.training.stage_plan import plan_stages

pytestmark = pytest.mark.slow

RANKS = Ranks(0, 0, 1, torch.device("cpu"))
NO_ROOM = "No space left on device"


class Disk:
    """Where files are opened to append to: with `room_bytes` left, or any number."""

    def __init__(self) -> None:
        self.room_bytes: int | None = None
        self.can_truncate = True

    def open(self, path: Path, *_: Any, **__: Any) -> io.FileIO:
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if disk.room_bytes is None:
                    return super().write(data)
                if not disk.room_bytes:
                    raise OSError(errno.ENOSPC, NO_ROOM)
                part = bytes(data[: disk.room_bytes])
                disk.room_bytes -= len(part)
                return super().write(part)

        return File(path, "a+")

    def truncate(self, path: Path, size_bytes: int) -> None:
        if not self.can_truncate:
            raise OSError(errno.EIO, "Input/output error")
        with path.open("r+b") as file:
            file.truncate(size_bytes)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, real_open = Disk(), Path.open

    def open_on_disk(path: Path, mode: str = "r", *others: Any, **options: Any) -> Any:
        return disk.open(path) if mode == "a+b" else real_open(path, mode, *others, **options)

    monkeypatch.setattr(Path, "open", open_on_disk)
    monkeypatch.setattr("pipeline.training.side_files.os.truncate", disk.truncate)
    return disk


@pytest.mark.parametrize("can_truncate", [True, False])
@pytest.mark.parametrize("room_bytes", [0, 3, 12, 14])
def test_lines_wait_whole_and_in_order(
    room_bytes: int, can_truncate: bool, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.jsonl"
    lines = LineFile(path)
    assert lines.append("[1]")
    disk.room_bytes, disk.can_truncate = room_bytes, can_truncate
    assert not lines.append('["second"]', "[3]")
    if can_truncate:
        assert path.read_text() == "[1]\n"
    assert not lines.append("[4]")
    assert not lines.append()
    disk.room_bytes = None
    assert lines.append("[5]")
    assert path.read_text() == '[1]\n["second"]\n[3]\n[4]\n[5]\n'
    said = f"warning: {path} cannot be written: {NO_ROOM}; training goes on, these lines are written when it can be\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("whole", ["", "[0]\n"])
def test_a_line_that_was_cut_off_by_a_kill_is_removed(whole: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(whole + '{"step": 12, "lo')
    LineFile(path).append("[1]")
    assert path.read_text() == whole + "[1]\n"


def test_nothing_to_write_makes_no_file(tmp_path: Path) -> None:
    assert LineFile(tmp_path / "some.jsonl").append()
    assert not list(tmp_path.iterdir())


def fault(step: int) -> Fault:
    return Fault(
        StepOutcome(step, float("nan"), True, ("0.tar: 7",), False), "non_finite", "go_on", f"step {step}: nan"
    )


def log_line(logger: RunLogger, step: int) -> None:
    names = ("epoch", "loss", "lr", "samples_per_s", "tokens_per_s", "mask_ratio", "data_wait_share")
    logger.log({"step": step, **dict.fromkeys((*names, "seconds_per_step", "wall_time_s"), 1.0)})


def test_metrics_faults_and_bad_samples_go_on(disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("demo", ["model.name=ViT-test-8"])
    logger = RunLogger(tmp_path, 0, plan_stages(recipe, 960, 1, 300, 3), recipe.log)
    faults, bad_samples = FaultLog(tmp_path, RANKS), BadSamples(tmp_path, RANKS, 0.5, "shards")
    for step in range(1, 8):
        disk.room_bytes = 10 if 3 <= step <= 5 else None
        log_line(logger, step)
        faults.note([fault(step)] if step < 5 else [])
        bad_samples.note([f"0.tar: {step}"] if step < 5 else [], samples_read=8)
    logger.close()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 8))
    written = [json.loads(line) for line in (tmp_path / "faults_rank0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 2, 3, 4], "what waited needs no other fault to be written"
    assert (tmp_path / "bad_samples_rank0.txt").read_text() == "".join(f"0.tar: {step}\n" for step in range(1, 5))
    assert bad_samples.count == 4
    out, err = capsys.readouterr()
    assert out.count("warning: skipped 0.tar") == 4
    assert [line.split(" cannot")[0] for line in err.splitlines()] == [
        f"warning: {tmp_path / name}" for name in ("metrics.jsonl", "faults_rank0.jsonl", "bad_samples_rank0.txt")
    ]


def test_bad_samples_are_shown_a_few_times_also_if_none_can_be_listed(
    disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad_samples_rank0.txt").write_text("by an earlier start\n")
    bad_samples = BadSamples(tmp_path, RANKS, 0.5, "shards")
    disk.room_bytes = 0
    for number in range(9):
        bad_samples.note([f"0.tar: {number}"], samples_read=8)
    assert capsys.readouterr().out.count("warning: skipped") == 4


def test_curves_lose_points_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's thread dies of the first error and is replaced when there is room."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, NO_ROOM)

    curves, write = Curves(tmp_path, 0), RecordWriter.write
    for step in range(1, 8):
        monkeypatch.setattr(RecordWriter, "write", fail if step in (3, 4) else write)
        curves.add({"step": step, "loss": 1.0})
        with contextlib.suppress(OSError):
            if curves._writer:
                curves._writer.flush()  # the thread does so when it likes
    curves.close()
    said = f"{NO_ROOM}; training goes on, points of its curves are lost\n"
    assert capsys.readouterr().err == f"warning: {tmp_path / 'tensorboard'} cannot be written: {said}"
    accumulated = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulated.Reload()
    steps = {event.step for event in accumulated.Scalars("train/loss")}
    assert steps - {5} == {1, 2, 6, 7}, "at step 5 the thread may be found dead"


def test_output_on_a_full_disk_is_dropped() -> None:
    code = """if True:
        import sys
        from pipeline.training.faults.liveness import StopRequest
        StopRequest().listen()
        for _ in range(100):
            print("a line of progress " * 100, flush=True)
        print("went on", file=sys.stderr)
    """
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "went on\n")


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, NO_ROOM)

    window = ProfileWindow((1, 1), tmp_path, RANKS)
    window.before(1)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", no_room)
    assert window.after(1) is None
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'profile'} cannot be written: {NO_ROOM}; training goes on, the trace is lost\n"
    )
