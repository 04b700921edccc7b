"""How the command-line programs of the pipeline begin and end."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from formats.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def add_launcher_argument(parser: argparse.ArgumentParser) -> None:
    """Accept the `--local_rank=N` that the `deepspeed` launcher appends; the environment says the same."""
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)


def _report(text: str, code: int) -> int:
    rank = int(os.environ.get("RANK", "0"))
    print(f"error: {text}" if rank == 0 else f"error (rank {rank}): {text}", file=sys.stderr, flush=True)
    return code


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a program; a UserError becomes one line on stderr (of each rank that meets it) and its exit code.

    So does a disk without room, where it was not seen to before.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            where = error.filename or "a file"
            code = _report(f"{where} cannot be written: {error.strerror}; make room and run it again", 2)
        elif isinstance(error, BrokenPipeError):  # whoever read the output, `head` for one, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 128 + signal.SIGPIPE
        else:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # at once: torn down in order, a rank whose peers are gone is aborted by gloo's threads, and its code is lost
        os._exit(code)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.exit(0)
