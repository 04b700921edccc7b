"""Commands: url lists, before anything is fetched."""

from __future__ import annotations

import argparse

from data_prep.commands.options import Commands, add_command


def add_ingest(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep ingest`."""
    formats = ("auto", "cc3m", "cc12m", "laion", "datacomp", "parquet", "csv", "jsonl")
    parser = add_command(commands, "ingest", _ingest, "url lists of any usual format -> one canonical parquet")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="file, folder or pattern; local, s3://, gs://, hdfs://"
    )
    parser.add_argument("--output", required=True, metavar="PARQUET", help="parquet to write")
    parser.add_argument("--format", choices=formats, default="auto", help="format of the sources")
    parser.add_argument("--url-column", metavar="NAME", help="column with the url (default: by usual names)")
    parser.add_argument("--caption-column", metavar="NAME", help="column with the caption (likewise)")


def _ingest(options: argparse.Namespace) -> int:
    from data_prep.ingest import ingest
    from data_prep.url_lists import ColumnChoice

    choice = ColumnChoice(url=options.url_column, caption=options.caption_column)
    ingest(options.sources, options.output, options.format, choice)
    return 0
