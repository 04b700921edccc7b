"""Errors that are the user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """What is wrong, where, and what to do, in one line; shown without a traceback, exit code 2."""

    exit_code = 2


class PeerLostError(UserError):
    """Another rank, or a loader process, ended while this rank needed it; EX_UNAVAILABLE of sysexits.h."""

    exit_code = 69


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""
