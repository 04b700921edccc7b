"""The `data-prep` command: one program for all that prepares data, each task a command of its own."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence

from data_prep.commands.balancing import add_balance, add_clusters, add_embeddings
from data_prep.commands.concepts import add_concepts
from data_prep.commands.content import add_dedup, add_forget, add_stats, add_words
from data_prep.commands.corpora import add_pack, add_synthetic
from data_prep.commands.metadata import add_build, add_ingest, add_sources
from data_prep.commands.shards import add_merge, add_reshard, add_tokenizer, add_verify
from data_prep.commands.web import add_download, add_report, add_retry
from formats.programs import exit_code_of

# What a command imports, it imports when it runs: `--help` answers at once.


# in the order of use
GROUPS = {
    "get pairs from the web": (add_sources, add_ingest, add_download, add_retry, add_report),
    "get pairs from here": (add_synthetic, add_pack),
    "look after shards": (add_verify, add_stats, add_dedup, add_forget, add_reshard, add_merge),
    "make ready for training": (add_tokenizer, add_words, add_concepts, add_embeddings, add_clusters, add_balance),
    "all of it": (lambda commands: add_build(commands, main, make_parser),),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="data-prep",
        usage="data-prep COMMAND [options]",
        description="Url lists or local images -> tar shards with a manifest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(prog="data-prep", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    lines = []
    for title, adders in GROUPS.items():
        before = len(commands.choices)
        for add in adders:
            add(commands)
        added = list(commands.choices.items())[before:]
        lines += [f"{title}:", *(f"  {name:<11}{command.description}" for name, command in added), ""]
    parser.epilog = "\n".join([*lines, "options of a command: data-prep COMMAND --help"])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `data-prep` command; returns the exit code (0 done, 1 problems found, 2 cannot work)."""
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
