"""Commands: what the pictures and captions of finished shards are, and taking some of them away."""

from __future__ import annotations

import argparse

from data_prep.commands.options import (
    Commands,
    add_command,
    add_max_removed,
    add_output,
    add_processes,
    byte_count,
    not_negative,
    positive,
)
from formats.errors import UserError
from formats.files import path_argument

MOST_BITS = 16  # of --max-distance


def add_stats(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep stats`."""
    parser = add_command(commands, "stats", _stats, "caption lengths, picture sizes, words: stats.json and stats.html")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="verified shard directory")
    add_output(parser)
    parser.add_argument(
        "--tokenizer", type=path_argument, metavar="MODEL", help="SentencePiece model: count tokens too"
    )
    add_processes(parser)


def _stats(options: argparse.Namespace) -> int:
    from data_prep.shards.stats import stats

    stats(options.directory, options.output, options.tokenizer, options.processes)
    return 0


def add_words(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep words`."""
    parser = add_command(commands, "words", _words, "how often each word occurs in the captions")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="verified shard directory")
    parser.add_argument("--output", type=path_argument, required=True, metavar="JSON", help="file to write")
    parser.add_argument("--min-count", type=positive, default=5, metavar="N", help="leave out rarer words")
    parser.add_argument(
        "--clusters",
        type=path_argument,
        metavar="CLUSTERS",
        help="of `data-prep clusters`: also the sizes of those that a word occurs in, for accuracy by rarity",
    )
    add_processes(parser)


def _words(options: argparse.Namespace) -> int:
    from data_prep.shards.words import count_words

    count_words(options.directory, options.output, options.min_count, options.processes, options.clusters)
    return 0


def add_dedup(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep dedup`."""
    parser = add_command(commands, "dedup", _dedup, "near-duplicate pictures, also of evaluation sets")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="verified shard directory")
    add_output(parser)
    parser.add_argument(
        "--against",
        type=path_argument,
        nargs="+",
        default=[],
        metavar="SET",
        help="evaluation sets or other shard directories",
    )
    parser.add_argument(
        "--max-distance", type=not_negative, default=4, metavar="BITS", help="of 64, in which near pictures differ"
    )
    parser.add_argument("--remove", action="store_true", help="rewrite the shards without what is found")
    add_max_removed(parser)
    parser.add_argument("--pictures", type=not_negative, default=60, metavar="N", help="pairs to show in the report")
    parser.add_argument("--memory", type=byte_count, default="2G", metavar="SIZE", help="for the comparison")
    add_processes(parser)


def _dedup(options: argparse.Namespace) -> int:
    from data_prep.near.dedup import dedup

    if options.max_distance > MOST_BITS:
        raise UserError(f"--max-distance {options.max_distance} is more than {MOST_BITS}: unlike pictures differ in 32")
    dedup(
        options.directory,
        options.against,
        options.output,
        max_distance=options.max_distance,
        remove=options.remove,
        max_removed=options.max_removed,
        pictures=options.pictures,
        processes=options.processes,
        memory_bytes=options.memory,
    )
    return 0


def add_forget(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep forget`."""
    parser = add_command(commands, "forget", _forget, "remove what a list of hashes, addresses or hosts names")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="verified shard directory")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--sha256", type=path_argument, metavar="LIST", help="hashes of pictures, as published or as stored"
    )
    kind.add_argument("--url", type=path_argument, metavar="LIST", help="addresses; http or https is the same")
    kind.add_argument("--host", type=path_argument, metavar="LIST", help="host names; those below them are meant too")
    add_max_removed(parser)
    add_processes(parser)


def _forget(options: argparse.Namespace) -> int:
    from data_prep.forget import forget

    if options.sha256 is not None:
        forget(options.directory, options.sha256, "sha256", options.processes, options.max_removed)
    elif options.url is not None:
        forget(options.directory, options.url, "url", options.processes, options.max_removed)
    else:
        forget(options.directory, options.host, "host", options.processes, options.max_removed)
    return 0
