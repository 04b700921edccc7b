"""Ranks that cannot find each other end with a line each, and soon."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import unused_port
from plain_user import outcome

from formats.errors import UserError
from pipeline import evaluate, ranks, train
from pipeline.ranks import init_ranks


def join(_: Sequence[str]) -> int:
    init_ranks()
    return 0


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Of another program of this machine."""
    with socket.create_server(("", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def world_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a launcher's rank 0; ranks wait for each other for two seconds."""
    monkeypatch.setattr(ranks, "MEETING_PATIENCE", timedelta(seconds=2))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_port_that_is_taken_is_named(taken_port: int, world_of_two: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world_of_two.setenv("MASTER_PORT", str(taken_port))
    said = f"error: port {taken_port} is taken on 127.0.0.1: choose another MASTER_PORT for all ranks\n"
    assert outcome(join, [], tmp_path / "log") == (2, said)


@pytest.mark.parametrize("is_taken", [True, False])
def test_others_say_whom_they_could_not_reach(
    is_taken: bool, taken_port: int, world_of_two: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = taken_port if is_taken else unused_port()
    world_of_two.setenv("RANK", "1")
    world_of_two.setenv("MASTER_PORT", str(port))
    code, said = outcome(join, [], tmp_path / "log")
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert code == 69
    assert line.startswith(f"error (rank 1): rank 1 could not reach rank 0 at 127.0.0.1:{port}, see its output for why")
    assert "Traceback" not in said


def test_a_rank_that_does_not_come_is_missed(world_of_two: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = unused_port()
    world_of_two.setenv("MASTER_PORT", str(port))
    code, said = outcome(join, [], tmp_path / "log")
    assert (code, f"error: not all 2 ranks came to 127.0.0.1:{port}" in said) == (69, True), said


@pytest.mark.parametrize(("name", "value"), [("RANK", "first"), ("MASTER_PORT", "-1"), ("WORLD_SIZE", "")])
def test_what_is_no_number_in_the_environment_is_named(name: str, value: str, world_of_two: pytest.MonkeyPatch) -> None:
    world_of_two.setenv("MASTER_PORT", "29500")
    world_of_two.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}='{value}' in the environment is no number"):
        init_ranks()


def test_programs_say_it(
    taken_port: int, world_of_two: pytest.MonkeyPatch, tiny_options: list[str], tmp_path: Path
) -> None:
    world_of_two.setenv("MASTER_PORT", str(taken_port))
    code, said = outcome(train.main, [*tiny_options, f"train.output={tmp_path / 'run'}"], tmp_path / "log")
    assert (code, f"error: port {taken_port} is taken" in said) == (2, True), said
    assert not (tmp_path / "run").exists()
    assert evaluate.init_ranks is init_ranks
