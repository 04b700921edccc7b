"""The `data-prep` command: url lists or local images -> tar shards with a manifest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.errors import UserError

# What a command imports, it imports when it runs: `--help` answers at once.

Commands = argparse._SubParsersAction  # the type that add_subparsers returns has no public name
PROCESSES = os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `data-prep` command; returns the exit code (0 done, 1 problems found, 2 cannot work)."""
    parser = argparse.ArgumentParser(
        prog="data-prep",
        description=__doc__,
        epilog="Web data: ingest, download, verify. Local data: pack, verify. Then: tokenizer.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_synthetic, _add_ingest, _add_download, _add_pack, _add_verify, _add_tokenizer):
        add(commands)
    options = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, a missing permission, an unreachable bucket
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_synthetic(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "synthetic", _synthetic, "draw image-caption pairs and evaluation sets")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--train", type=_positive, default=20_000, metavar="N", help="training pairs")
    parser.add_argument("--validation", type=_positive, default=1000, metavar="N", help="validation pairs")
    parser.add_argument("--size", type=_positive, default=64, metavar="PX", help="side of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    _add_processes(parser)
    parser.add_argument("--base-url", metavar="URL", help="also write train.tsv with urls under this address")


def _synthetic(options: argparse.Namespace) -> int:
    from data_prep.synthetic import generate

    generate(
        output=options.output,
        train=options.train,
        validation=options.validation,
        size=options.size,
        seed=options.seed,
        processes=options.processes,
        base_url=options.base_url,
    )
    return 0


def _add_ingest(commands: Commands[argparse.ArgumentParser]) -> None:
    formats = ("auto", "cc3m", "cc12m", "laion", "datacomp", "parquet", "csv", "jsonl")
    parser = _add(commands, "ingest", _ingest, "url lists of any usual format -> one canonical parquet")
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


def _add_download(commands: Commands[argparse.ArgumentParser]) -> None:
    modes = ("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no")
    parser = _add(commands, "download", _download, "canonical parquet -> shards, over HTTP")
    parser.add_argument("urls", type=Path, metavar="PARQUET", help="what `data-prep ingest` wrote")
    _add_output(parser)
    parser.add_argument(
        "--image-size", type=_positive, default=256, metavar="PX", help="shorter side after scaling down"
    )
    parser.add_argument("--resize-mode", choices=modes, default="keep_ratio", help="how to scale down")
    parser.add_argument("--samples-per-shard", type=_positive, default=10_000, metavar="N", help="urls tried per shard")
    _add_processes(parser)
    parser.add_argument("--threads", type=_positive, default=64, metavar="N", help="requests per process")
    parser.add_argument("--timeout-s", type=_positive, default=10, metavar="S", help="limit per network wait")
    parser.add_argument("--retries", type=_not_negative, default=2, metavar="N", help="further tries per url")


def _download(options: argparse.Namespace) -> int:
    from data_prep.download import Settings, download

    settings = Settings(
        image_size=options.image_size,
        resize_mode=options.resize_mode,
        samples_per_shard=options.samples_per_shard,
        processes=options.processes,
        threads=options.threads,
        timeout_s=options.timeout_s,
        retries=options.retries,
    )
    download(options.urls, options.output, settings)
    return 0


def _add_pack(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "pack", _pack, "local images and captions -> shards or evaluation sets")
    parser.add_argument(
        "source", type=Path, metavar="SOURCE",
        help="folder (image.jpg beside image.txt), .csv or .tsv of paths, or .parquet with image bytes",
    )  # fmt: skip
    _add_output(parser)
    parser.add_argument(
        "--as", dest="layout", choices=("training", "retrieval", "classification"), default="training",
        help="what to write",
    )  # fmt: skip
    parser.add_argument("--image-column", metavar="NAME", help="image bytes or path (default: by usual names)")
    parser.add_argument("--caption-column", metavar="NAME", help="caption or list of captions (likewise)")
    parser.add_argument("--label-column", metavar="NAME", help="class name or number")
    parser.add_argument("--classnames", type=Path, metavar="FILE", help="one class per line")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="one template per line, {c} is the class")
    parser.add_argument(
        "--captions", choices=("first", "each"), default="first",
        help="of several captions: the first, or a sample for each",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="for drawing templates")
    parser.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N", help="shard size")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def _pack(options: argparse.Namespace) -> int:
    from data_prep import pack
    from data_prep.local_sources import Columns

    labels = (options.label_column, options.classnames, options.templates)
    labelled = all(labels)
    if any(labels) and not labelled:
        raise UserError("labels need all of --label-column, --classnames and --templates")
    if options.layout == "classification" and not labelled:
        raise UserError("--as classification needs --label-column, --classnames and --templates")
    if options.layout == "retrieval" and labelled:
        raise UserError("--as retrieval takes captions: drop --label-column, --classnames and --templates")
    columns = Columns(options.image_column, options.caption_column, options.label_column)
    classnames = pack.read_lines(options.classnames) if labelled else None
    templates = pack.read_lines(options.templates) if labelled else None
    if options.layout == "retrieval":
        pack.pack_retrieval(options.source, options.output, columns, overwrite=options.overwrite)
    elif options.layout == "classification" and classnames and templates:
        pack.pack_classification(
            options.source,
            options.output,
            columns,
            classnames=classnames,
            templates=templates,
            overwrite=options.overwrite,
        )
    else:
        pack.pack_training(
            options.source,
            options.output,
            columns,
            each_caption=options.captions == "each",
            classnames=classnames,
            templates=templates,
            seed=options.seed,
            samples_per_shard=options.samples_per_shard,
            overwrite=options.overwrite,
        )
    return 0


def _add_verify(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "verify", _verify, "decode every image of a shard directory, write its manifest")
    parser.add_argument("directory", type=Path, metavar="DIR", help="shard directory")
    _add_processes(parser)
    parser.add_argument(
        "--max-bad-ratio", type=float, default=0.01, metavar="R", help="share of unusable samples to accept"
    )


def _verify(options: argparse.Namespace) -> int:
    from data_prep.verify import verify

    return 0 if verify(options.directory, options.processes, options.max_bad_ratio) else 1


def _add_tokenizer(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "tokenizer", _tokenizer, "train SentencePiece on the captions of a shard directory")
    parser.add_argument("directory", type=Path, metavar="DIR", help="shard directory")
    parser.add_argument("--output", type=Path, required=True, metavar="MODEL", help="model file to write")
    parser.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="bpe suits captions of few distinct words"
    )
    parser.add_argument("--vocab-size", type=_positive, default=8192, metavar="N", help="most pieces")
    parser.add_argument(
        "--max-captions", type=_positive, default=2_000_000, metavar="N", help="train on a sample of at most N"
    )
    parser.add_argument("--seed", type=int, default=0, help="for drawing that sample")


def _tokenizer(options: argparse.Namespace) -> int:
    from data_prep.tokenizer import train_tokenizer

    train_tokenizer(
        options.directory,
        options.output,
        options.model_type,
        options.vocab_size,
        options.max_captions,
        options.seed,
    )
    return 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _add(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, formatter_class=_Formatter)
    parser.set_defaults(run=run)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=_positive, default=PROCESSES, metavar="N", help="parallel processes")


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(minimum: int, text: str) -> int:
    value = int(text)
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
