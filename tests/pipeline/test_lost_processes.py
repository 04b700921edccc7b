"""Errors that torch raises for a process that has ended, as a user reads them."""

from __future__ import annotations

import os
import signal

import pytest
from torch.utils.data import DataLoader

from pipeline.ranks import PeerLostError, explain_lost_peers


def kill_and_go_on(loader: DataLoader) -> None:
    batches = iter(loader)
    next(batches)
    os.kill(batches._workers[0].pid, signal.SIGKILL)
    list(batches)


def test_a_killed_loader_process_is_one_line() -> None:
    loader = DataLoader(range(1000), num_workers=1, prefetch_factor=1)
    with pytest.raises(PeerLostError, match=r"^a loader process was killed") as raised, explain_lost_peers():
        kill_and_go_on(loader)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 69


def test_a_socket_that_breaks_before_the_news_of_the_death_is_the_same_line() -> None:
    loader = DataLoader(range(1000), num_workers=1, prefetch_factor=1)
    batches = iter(loader)
    next(batches)

    def break_first() -> None:
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(PeerLostError, match=r"^a loader process was killed"), explain_lost_peers():
        break_first()


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^a shape$"), explain_lost_peers():
        raise RuntimeError("a shape")
    with pytest.raises(FileNotFoundError, match=r"^a file$"), explain_lost_peers():
        raise FileNotFoundError("a file")
