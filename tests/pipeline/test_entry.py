"""How programs end: one line for what a user can mend, a traceback for the rest, each with its exit code."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pytest

from formats.errors import UserError
from pipeline.entry import run


class Left(BaseException):
    """Instead of leaving the process."""


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (UserError("no such recipe"), 2, "error: no such recipe\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/run.json"),
            2,
            "error: run/run.json cannot be written: No space left on device; make room and run it again\n",
        ),
        (OSError(errno.ENOENT, "No such file"), 1, "Traceback"),
        (ValueError("a defect"), 1, "Traceback"),
    ],
)
def test_errors_are_a_line_or_a_traceback(
    error: Exception, code: int, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    def main(_: Sequence[str]) -> int:
        raise error

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        run(main)
    assert left.value.args == (code,)
    printed = capsys.readouterr().err
    assert printed == output or (output == "Traceback" and printed.startswith(output))
