"""The `data-prep` command: url lists or local images -> tar shards with a manifest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from data_prep.commands.content import add_dedup, add_forget, add_stats, add_words
from data_prep.commands.corpora import add_pack, add_synthetic
from data_prep.commands.metadata import add_build, add_ingest, add_sources
from data_prep.commands.shards import add_merge, add_reshard, add_tokenizer, add_verify
from data_prep.commands.web import add_download, add_report, add_retry
from formats.programs import exit_code_of

# What a command imports, it imports when it runs: `--help` answers at once.


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="data-prep",
        description=__doc__,
        epilog="Web data: ingest, download, verify. Local data: pack, verify. Then: tokenizer.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        *(
            add_build,
            add_sources,
            add_synthetic,
            add_ingest,
            add_download,
            add_retry,
            add_report,
            add_pack,
            add_tokenizer,
        ),
        *(add_verify, add_reshard, add_merge, add_stats, add_words, add_dedup, add_forget),
    ):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `data-prep` command; returns the exit code (0 done, 1 problems found, 2 cannot work)."""
    options = make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
