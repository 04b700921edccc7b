"""Commands: where pairs come from without the web: drawn, or local images."""

from __future__ import annotations

import argparse

from data_prep.commands.options import Commands, add_command, add_output, add_processes, positive
from formats.errors import UserError
from formats.files import path_argument


def add_synthetic(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep synthetic`."""
    parser = add_command(commands, "synthetic", _synthetic, "draw pairs of simple scenes, and evaluation sets of them")
    parser.add_argument("output", type=path_argument, metavar="OUT", help="folder to make")
    parser.add_argument("--train", type=positive, default=20_000, metavar="N", help="training pairs")
    parser.add_argument("--validation", type=positive, default=1000, metavar="N", help="validation pairs")
    parser.add_argument("--size", type=positive, default=64, metavar="PX", help="side of the pictures")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same bytes")
    add_processes(parser)
    parser.add_argument("--base-url", metavar="URL", help="also write train.tsv with urls under this address")


def _synthetic(options: argparse.Namespace) -> int:
    from data_prep.synthetic.corpus import generate

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


def add_pack(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep pack`."""
    parser = add_command(commands, "pack", _pack, "images and captions of yours -> shards or evaluation sets")
    parser.add_argument(
        "source", type=path_argument, metavar="SOURCE",
        help="folder of pictures (image.jpg beside image.txt, or class folders), or a table of paths or image bytes "
        "(.csv, .tsv, .json, .jsonl, .parquet), or a folder of tables",
    )  # fmt: skip
    add_output(parser)
    parser.add_argument(
        "--as", dest="layout", choices=("training", "retrieval", "classification"), default="training",
        help="what to write",
    )  # fmt: skip
    parser.add_argument(
        "--image-column", metavar="NAME", help="image bytes or path; found by its usual names if not named"
    )
    parser.add_argument("--caption-column", metavar="NAME", help="caption or list of captions; likewise")
    parser.add_argument("--label-column", metavar="NAME", help="class name or number, in a table")
    parser.add_argument(
        "--classnames", type=path_argument, metavar="FILE", help="one class per line; class folders do without"
    )
    parser.add_argument(
        "--templates",
        type=path_argument,
        metavar="FILE",
        help="one per line, {c} is the class; default: a photo of a {c}.",
    )
    parser.add_argument(
        "--captions", choices=("first", "each"), default="first",
        help="of several captions: the first, or a sample for each",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for drawing templates")
    parser.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="shard size")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def _pack(options: argparse.Namespace) -> int:
    from data_prep.packing import pack
    from data_prep.packing.local_sources import Columns, open_source

    classes = (options.label_column, options.classnames, options.templates)
    is_labelled = options.layout == "classification" or any(classes)
    if options.layout == "retrieval" and is_labelled:
        raise UserError("--as retrieval takes captions: drop --label-column, --classnames and --templates")
    columns = Columns(options.image_column, options.caption_column, options.label_column)
    source = open_source(options.source, columns, with_captions=not is_labelled)
    labels = None
    if is_labelled:
        if source.classes is None and options.label_column is None:
            raise UserError(f"{options.source} is a table: say with --label-column which column holds the class")
        labels = pack.make_labels(source, *(pack.read_lines(file) if file else None for file in classes[1:]))
    if options.layout == "retrieval":
        pack.pack_retrieval(source, options.output, overwrite=options.overwrite)
    elif options.layout == "classification" and labels:
        pack.pack_classification(source, options.output, labels, overwrite=options.overwrite)
    else:
        pack.pack_training(
            source,
            options.output,
            each_caption=options.captions == "each",
            labels=labels,
            seed=options.seed,
            samples_per_shard=options.samples_per_shard,
            overwrite=options.overwrite,
        )
    return 0
