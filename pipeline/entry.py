"""How the command-line programs of the pipeline begin and end."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import UserError


def add_launcher_argument(parser: argparse.ArgumentParser) -> None:
    """Accept the `--local_rank=N` that the `deepspeed` launcher appends; the environment says the same."""
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a program; a UserError becomes one line on stderr (of each rank that meets it) and its exit code."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception:
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
