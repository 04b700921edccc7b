"""Manners towards each host: how many requests at once, how many a second, and when to stop asking."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator

from data_prep.web.outcomes import CONNECT, THROTTLED, TIMEOUT, FetchError

GIVE_UP_AFTER = 10  # failures in a row
MAX_PAUSE_S = 60.0  # a host that asks for more is given up at once


@dataclasses.dataclass
class _Host:
    slots: asyncio.Semaphore
    next_start_s: float = 0.0
    failures: int = 0  # in a row
    given_up_for: str = ""  # the class of the last of them


class HostLimits:
    """At most `connections` requests at once to a host and `requests_per_s` a second; 429 pauses the whole host.

    A host that fails ten times in a row (no connection, no answer, 429), or that asks for a pause of more than a
    minute, is asked no more: a dead host with thousands of urls must not hold up a shard.
    """

    def __init__(self, connections: int, requests_per_s: float) -> None:
        self._connections = connections
        self._interval_s = 1 / requests_per_s
        self._hosts: dict[str, _Host] = {}

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for this host's turn; a FetchError that the block raises tells how the host is doing.

        Raises FetchError, not retryable, when the host was given up.
        """
        host = self._hosts.setdefault(name, _Host(asyncio.Semaphore(self._connections)))
        async with host.slots:
            while (wait_s := host.next_start_s - time.monotonic()) > 0:  # it may be put off while we wait
                await asyncio.sleep(wait_s)
            if host.failures >= GIVE_UP_AFTER:
                raise FetchError(host.given_up_for, "host given up: too many failures in a row")
            host.next_start_s = time.monotonic() + self._interval_s
            try:
                yield
            except FetchError as error:
                _note(host, error)
                raise
            host.failures = 0


def _note(host: _Host, error: FetchError) -> None:
    if error.outcome not in (CONNECT, TIMEOUT, THROTTLED):
        host.failures = 0
        return
    host.failures += 1
    host.given_up_for = error.outcome
    if error.outcome == THROTTLED:
        pause_s = error.retry_after_s or 0.0
        if pause_s > MAX_PAUSE_S:
            host.failures = GIVE_UP_AFTER
        else:
            host.next_start_s = max(host.next_start_s, time.monotonic() + pause_s)
