"""Waiting for what another process does, with a deadline that a loaded machine does not reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# It costs nothing while all goes well, and nobody waits as long for a test that has failed more than once.
PATIENCE_S = 600.0
_POLL_S = 0.02


def wait_for(condition: Callable[[], T], what: str, log: Callable[[], str] = str, timeout_s: float = PATIENCE_S) -> T:
    """What the condition gives, once that is true. AssertionError with `log()`, read then, if it never is."""
    end_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end_s, f"waited {timeout_s:.0f} s for {what}\n{log()}"
        time.sleep(_POLL_S)
    return value
