"""A directory has one owner: a second one is told who it is, and who comes after one that died does not wait long."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from waiting import PATIENCE_S, wait_for

from formats import owners
from formats.errors import UserError
from formats.owners import OWNER, Owner, owning

HOLD = """
import sys, time
from pathlib import Path
from formats import owners
from formats.programs import run
owners.TOUCH_S = 0.1
def main(arguments):
    with owners.owning(Path(arguments[0]), "is in use", "choose another"):
        print("mine", flush=True)
        time.sleep(60)
run(main)
"""


@contextlib.contextmanager
def holder(directory: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns a directory."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    environment = {**os.environ, **variables}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def take(directory: Path) -> None:
    with owning(directory, "is in use", "choose another"):
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same at ten times the speed and more."""
    for name, value in {"TOUCH_S": 0.1, "STALE_S": 0.6, "SETTLE_S": 0.2, "ENDING_S": 0.3, "_LOOK_S": 0.05}.items():
        monkeypatch.setattr(owners, name, value)


def leave_elsewhere(directory: Path, **fields: object) -> None:
    """What an owner on another machine has left."""
    directory.mkdir(exist_ok=True)
    other = dataclasses.replace(Owner.this_process(), machine="another", host="node7", **fields)  # type: ignore[arg-type]
    (directory / OWNER).write_text(json.dumps(dataclasses.asdict(other)))


def test_the_second_is_told_who_and_changes_nothing(tmp_path: Path) -> None:
    with holder(tmp_path, SLURM_JOB_ID="77", SLURMD_NODENAME="node3") as other:
        before = (tmp_path / OWNER).read_bytes()
        with pytest.raises(UserError) as refused:
            take(tmp_path)
        said = f"{tmp_path} is in use by process {other.pid} on node3, job 77, since 20"
        assert str(refused.value).startswith(said)
        assert str(refused.value).endswith("Z: wait until it has ended, or choose another")
        assert (tmp_path / OWNER).read_bytes() == before


def test_whoever_comes_after_a_killed_one_starts_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.kill()  # not yet waited for: a zombie owns nothing
        start_s = time.monotonic()
        take(tmp_path)
        assert time.monotonic() - start_s < 5
    assert not (tmp_path / OWNER).exists()


def test_a_process_number_used_again_is_not_the_owner(tmp_path: Path, quick: None) -> None:
    tmp_path.joinpath(OWNER).write_text(
        json.dumps(dataclasses.asdict(dataclasses.replace(Owner.this_process(), started=1)))
    )
    take(tmp_path)


def test_nothing_is_left_where_nothing_came_of_it(tmp_path: Path) -> None:
    take(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with owning(tmp_path / "new", "", ""):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_one_of_another_machine_is_followed_when_it_shows_no_life(tmp_path: Path, quick: None) -> None:
    leave_elsewhere(tmp_path)
    start_s = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - start_s >= 0.6


def test_one_of_another_machine_that_lives_is_not_disturbed(tmp_path: Path, quick: None) -> None:
    leave_elsewhere(tmp_path)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(tmp_path / OWNER)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(UserError, match="on node7"):
        take(tmp_path)
    ended.set()
    thread.join()


@pytest.mark.parametrize(("restart", "waits"), [("1", False), ("0", True)])
def test_a_job_that_is_queued_again_follows_itself(
    restart: str, waits: bool, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_elsewhere(tmp_path, job="5", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    start_s = time.monotonic()
    take(tmp_path)
    assert (time.monotonic() - start_s >= 0.6) == waits


@pytest.mark.parametrize("left", [None, "stale", b"", b"[1]", b'{"pid": "x"}', b"\xff\x00"])
def test_of_many_at_once_one_gets_it(left: str | bytes | None, tmp_path: Path, quick: None) -> None:
    directory = tmp_path / "run"
    if left == "stale":
        leave_elsewhere(directory)
    elif isinstance(left, bytes):
        directory.mkdir()
        (directory / OWNER).write_bytes(left)
    fork = multiprocessing.get_context("fork")
    start, ended = fork.Event(), fork.Event()

    def compete() -> None:
        start.wait()
        try:
            with owning(directory, "is in use", "choose another"):
                ended.wait(PATIENCE_S)
        except UserError:
            os._exit(2)
        os._exit(0)

    processes = [fork.Process(target=compete) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    wait_for(lambda: sum(process.is_alive() for process in processes) <= 1, "all but one to give up")
    ended.set()
    for process in processes:
        process.join()
    assert sorted(process.exitcode or 0 for process in processes) == [0, 2, 2, 2, 2, 2]


def test_an_owner_taken_for_dead_leaves_when_it_wakes(tmp_path: Path, quick: None) -> None:
    """It was suspended, and another machine's process, which cannot see that, has followed it."""
    with holder(tmp_path) as other:
        os.kill(other.pid, signal.SIGSTOP)
        leave_elsewhere(tmp_path)
        os.kill(other.pid, signal.SIGCONT)
        assert other.wait(PATIENCE_S) == 2
        assert other.stderr is not None
        assert "was taken over by process" in other.stderr.read()


def test_a_file_that_somebody_tidied_up_comes_back(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        (tmp_path / OWNER).unlink()
        wait_for((tmp_path / OWNER).exists, "the file")
        with pytest.raises(UserError, match=f"process {other.pid}"):
            take(tmp_path)
