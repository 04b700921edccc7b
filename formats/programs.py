"""How the command-line programs begin and end: a line for what a user can mend, a traceback for a defect."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from formats.errors import UserError, describe_os_error


def add_launcher_argument(parser: argparse.ArgumentParser) -> None:
    """Accept the `--local_rank=N` that the `deepspeed` launcher appends; the environment says the same."""
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)


def positive(text: str) -> float:
    """A finite number above 0, argparse's `type=`."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def whole(text: str) -> int:
    """A whole number above 0, also as 1e7; likewise."""
    value = positive(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(value)


def exit_code_of(work: Callable[[], int]) -> int:
    """Do a program's work; whatever it raises is said on stderr, by each rank that meets it, and becomes an exit code.

    0 done; 1 a defect, with its traceback; 2 something of the user's, in one line; 130 Ctrl-C; 141 nobody reads on
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except UserError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again", 128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read the output, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if (text := describe_os_error(error)) is not None:
            return _say(text, UserError.exit_code)
        traceback.print_exc()
    except Exception:
        traceback.print_exc()
    return 1


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a program with the command line's arguments and leave with its exit code."""
    code = exit_code_of(lambda: main(sys.argv[1:]))
    sys.stderr.flush()
    if code:
        # at once: torn down in order, a rank whose peers are gone is aborted by gloo's threads, and its code is lost
        os._exit(code)
    distributed = sys.modules.get("torch.distributed")  # not imported here: few programs need it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.exit(0)


def _say(text: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"error: {text}" if rank == "0" else f"error (rank {rank}): {text}", file=sys.stderr, flush=True)
    return code
