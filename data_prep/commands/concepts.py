"""Command: what captions name, in the order in which it is taught."""

from __future__ import annotations

import argparse

from data_prep.commands.options import Commands, add_command, add_processes, array_slice, positive, share
from formats.files import path_argument

GRAPHS = ("cooccurrence", "wordnet", "conceptnet")


def add_concepts(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep concepts`."""
    parser = add_command(commands, "concepts", _concepts, "what the captions name, in stages: for training by concepts")
    parser.add_argument("directory", type=path_argument, metavar="SHARDS", help="verified shard directory")
    parser.add_argument("--output", type=path_argument, required=True, metavar="JSONL", help="file to write")
    parser.add_argument("--stages", type=_stages, default=4, metavar="N", help="to teach them in")
    parser.add_argument(
        "--graph", type=_graph, default=("cooccurrence", ""), metavar="GRAPH",
        help="what connects concepts: cooccurrence (in captions; default), wordnet:DIR, conceptnet:FILE",
    )  # fmt: skip
    parser.add_argument("--min-count", type=positive, default=20, metavar="N", help="captions that hold a concept")
    parser.add_argument("--most", type=positive, default=10_000, metavar="N", help="concepts: the most frequent ones")
    parser.add_argument(
        "--min-npmi-of-words", type=share, default=0.45, metavar="X", help="of the parts of a concept of several words"
    )
    parser.add_argument("--min-npmi", type=share, default=0.1, metavar="X", help="of connected concepts (cooccurrence)")
    parser.add_argument(
        "--min-together", type=positive, default=5, metavar="N", help="captions that hold both (cooccurrence)"
    )
    parser.add_argument("--first-share", type=share, default=0.1, metavar="SHARE", help="of concepts in stage 1")
    parser.add_argument("--language", default="en", metavar="CODE", help="of conceptnet's terms")
    parser.add_argument(
        "--slice", type=array_slice, metavar="I/N", help="count share I (from 0) of N of the shards, in an array job"
    )
    add_processes(parser)


def _concepts(options: argparse.Namespace) -> int:
    from data_prep.concepts.extract import Choice, extract_concepts

    graph, source = options.graph
    choice = Choice(
        stages=options.stages,
        graph=graph,
        source=path_argument(source) if source else None,
        min_count=options.min_count,
        most=options.most,
        min_npmi_of_words=options.min_npmi_of_words,
        min_npmi=options.min_npmi,
        min_together=options.min_together,
        first_share=options.first_share,
        language=options.language,
    )
    extract_concepts(options.directory, options.output, choice, processes=options.processes, part=options.slice)
    return 0


def _stages(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return value


def _graph(text: str) -> tuple[str, str]:
    """(kind, path): the kinds that read files need one."""
    kind, _, path = text.partition(":")
    if kind not in GRAPHS or bool(path) == (kind == "cooccurrence"):
        raise argparse.ArgumentTypeError(f"must be cooccurrence, wordnet:DIR or conceptnet:FILE, got {text!r}")
    return kind, path
