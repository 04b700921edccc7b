"""Commands: url lists, before anything is fetched; and the whole preparation from one file."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
from collections.abc import Callable, Sequence

from data_prep.commands.options import Commands, add_command, add_processes, array_slice, not_negative, positive
from data_prep.lists.catalogue import GENERIC, INGESTIBLE
from formats.errors import UserError
from formats.files import location_argument, path_argument

UNIQUE = ("url", "caption", "pair", "none")


def add_sources(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep sources`."""
    parser = add_command(commands, "sources", _sources, "known data sets: size, licence, what to expect of a download")
    parser.add_argument("names", nargs="*", metavar="NAME", help="tell all about these; without one: a table")


def _sources(options: argparse.Namespace) -> int:
    from data_prep.lists.catalogue import describe, print_catalogue

    if options.names:
        print("\n\n".join(describe(name) for name in options.names))
    else:
        print_catalogue()
    return 0


def add_ingest(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep ingest`."""
    parser = add_command(commands, "ingest", _ingest, "url lists in any usual format -> one clean list for download")
    parser.add_argument(
        "sources",
        nargs="+",
        type=location_argument,
        metavar="SOURCE",
        help="file, folder or pattern; local, s3://, gs://, hdfs://",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=location_argument,
        metavar="OUT",
        help="NAME.parquet: one file; another name: a folder of parts",
    )
    parser.add_argument(
        "--format", choices=("auto", *GENERIC, *INGESTIBLE), default="auto", metavar="FORMAT",
        help=f"auto (by the name), {', '.join(GENERIC)}, or a published data set: {', '.join(INGESTIBLE)}",
    )  # fmt: skip
    parser.add_argument(
        "--url-column", metavar="NAME", help="column with the url; found by its usual names if not named"
    )
    parser.add_argument("--caption-column", metavar="NAME", help="column with the caption; likewise")
    parser.add_argument(
        "--unique", nargs="+", choices=UNIQUE, default=["url"], metavar="KEY",
        help="keep only the first row of each url, caption or pair; none: keep all",
    )  # fmt: skip
    _add_filters(parser)
    add_processes(parser)
    parser.add_argument(
        "--slice", type=array_slice, metavar="I/N", help="only read share I (from 0) of N; finish without --slice"
    )
    parser.add_argument(
        "--i-have-a-cleaned-copy", action="store_true", help="accept metadata that was withdrawn (LAION-5B, LAION-400M)"
    )


def _add_filters(parser: argparse.ArgumentParser) -> None:
    filters = parser.add_argument_group("filters, all inclusive; a limit on a column that a list lacks is an error")
    filters.add_argument("--min-caption-chars", type=positive, default=1, metavar="N", help="shortest caption")
    filters.add_argument("--max-caption-chars", type=positive, default=10_000, metavar="N", help="longest caption")
    filters.add_argument("--min-caption-words", type=positive, default=1, metavar="N", help="fewest words")
    filters.add_argument(
        "--language", nargs="+", default=[], metavar="CODE",
        help="languages to keep (en, de, …), by the list's column or else guessed (pip install cluster-clip[language])",
    )  # fmt: skip
    filters.add_argument("--min-side", type=not_negative, metavar="PX", help="shorter side of the image")
    filters.add_argument("--max-aspect", type=float, metavar="R", help="longer side over shorter side")
    filters.add_argument("--min-similarity", type=float, metavar="S", help="published image-text similarity")
    filters.add_argument("--min-aesthetic", type=float, metavar="A", help="published aesthetic score")
    filters.add_argument("--max-punsafe", type=float, metavar="P", help="published probability of unsafe content")
    filters.add_argument("--max-watermark", type=float, metavar="P", help="published probability of a watermark")
    filters.add_argument(
        "--block",
        nargs="+",
        type=location_argument,
        default=[],
        metavar="FILE",
        help="lists of urls, hosts or sha256 to leave out, one a line",
    )


def _ingest(options: argparse.Namespace) -> int:
    from data_prep.lists.filters import Filters, read_block_lists
    from data_prep.lists.ingest import Slice, ingest
    from data_prep.lists.list_files import ColumnChoice, ListFormat
    from data_prep.lists.rows import Options

    if "none" in options.unique and len(options.unique) > 1:
        raise UserError("--unique none goes with no other key")
    choice = ColumnChoice(url=options.url_column, caption=options.caption_column)
    filters = Filters(
        min_caption_chars=options.min_caption_chars,
        max_caption_chars=options.max_caption_chars,
        min_caption_words=options.min_caption_words,
        languages=tuple(code.lower() for code in options.language),
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        min_similarity=options.min_similarity,
        min_aesthetic=options.min_aesthetic,
        max_punsafe=options.max_punsafe,
        max_watermark=options.max_watermark,
        block=read_block_lists(options.block),
    )
    ingest(
        options.sources,
        options.output,
        Options(
            list_format=ListFormat(options.format, choice, options.i_have_a_cleaned_copy),
            filters=filters,
            unique=tuple(key for key in dict.fromkeys(options.unique) if key != "none"),
        ),
        processes=options.processes,
        share=Slice(*options.slice) if options.slice else None,
    )
    return 0


def add_build(
    commands: Commands[argparse.ArgumentParser],
    run_command: Callable[[Sequence[str]], int],
    make_parser: Callable[[], argparse.ArgumentParser],
) -> None:
    """`data-prep build`, whose stages are commands: how one is run, and how it is checked."""
    run = functools.partial(_build, run_command, make_parser)
    parser = add_command(commands, "build", run, "every stage from one YAML file; run it again to go on")
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG.yaml", help="stages and their options (docs/ingest.md)"
    )
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone")
    parser.add_argument("--slice", type=array_slice, metavar="I/N", help="its share I (from 0) of N, for array jobs")
    parser.add_argument("--dry-run", action="store_true", help="check the file and print its stages")


def _build(
    run_command: Callable[[Sequence[str]], int],
    make_parser: Callable[[], argparse.ArgumentParser],
    options: argparse.Namespace,
) -> int:
    from data_prep.build import build, read_plan, show

    if options.slice and not options.only:
        raise UserError("--slice needs --only STAGE: the stages after it need all slices")
    parser = make_parser()

    def check(arguments: Sequence[str]) -> None:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as message:
                parser.parse_args(arguments)
        except SystemExit:
            line = message.getvalue().strip().rpartition("error: ")[2]
            raise UserError(f"{options.config}, {arguments[0]}: {line}") from None

    plan = read_plan(options.config)
    if options.dry_run:
        show(plan, check)
        return 0
    share = "{}/{}".format(*options.slice) if options.slice else None
    return 0 if build(plan, run_command, check, options.only, share) else 1
