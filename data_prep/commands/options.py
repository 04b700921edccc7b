"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable

from formats.files import path_argument

Commands = argparse._SubParsersAction  # the type that add_subparsers returns has no public name
# those that this process may use, where the system says: a batch job often has a few of a node's many
PROCESSES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

MAX_RATE = 256  # formats.balance's; not imported here, for the help of commands is to answer at once


class _Formatter(argparse.HelpFormatter):
    """Show a default where there is one, as it would be typed, unless the help says it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if not action.option_strings or isinstance(default, bool) or default in (None, argparse.SUPPRESS, (), []):
            return action.help
        if "default" in (action.help or ""):
            return action.help
        if isinstance(default, list | tuple):  # several words, or one with commas (`words`)
            default = (" " if isinstance(default, list) else ",").join(map(str, default))
        return f"{action.help} (default: {default})".replace("%", "%%")


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    """A command of its own: `run` gets the parsed options and returns the exit code."""
    parser = commands.add_parser(name, description=summary, formatter_class=_Formatter)
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--output DIR`."""
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="folder to write to")


def add_processes(parser: argparse._ActionsContainer) -> None:
    """`--processes N`."""
    parser.add_argument("--processes", type=positive, default=PROCESSES, metavar="N", help="parallel processes")


def add_max_removed(parser: argparse.ArgumentParser) -> None:
    """`--max-removed SHARE`."""
    parser.add_argument(
        "--max-removed",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="of the samples; more are not removed unless told",
    )


def positive(text: str) -> int:
    """An integer of at least 1, for argparse's `type`."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """An integer of at least 0, likewise."""
    return _at_least(0, text)


def above_zero(text: str) -> float:
    """A number above 0, likewise."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1, likewise."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def jpeg_quality(text: str) -> int:
    """From 1 to 100, likewise."""
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be from 1 to 100, got {text}")
    return value


def rate(text: str) -> float:
    """How often a sample is read in an epoch, likewise."""
    value = float(text)
    if not 0 <= value <= MAX_RATE:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MAX_RATE}, got {text}")
    return value


def words(text: str) -> tuple[str, ...]:
    """Words with commas between them, likewise."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def byte_count(text: str) -> int:
    """A number of bytes, of which K, M, G and T are powers of 1,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    size_bytes = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if size_bytes < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500M or 2G, got {text}")
    return size_bytes


def array_slice(text: str) -> tuple[int, int]:
    """`I/N`, share I of N with I from 0, as array jobs count."""
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 0/8, got {text!r}") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text}")
    return index, count


def _at_least(minimum: int, text: str) -> int:
    value = int(text)
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
    return value
