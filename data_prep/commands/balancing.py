"""Commands: clusters of pictures by meaning, and how often to read the samples of each."""

from __future__ import annotations

import argparse

from data_prep.commands.options import (
    Commands,
    above_zero,
    add_command,
    add_output,
    add_processes,
    array_slice,
    not_negative,
    positive,
    rate,
    share,
)
from formats.errors import UserError
from formats.files import path_argument


def add_embeddings(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep embeddings`."""
    parser = add_command(commands, "embeddings", _embeddings, "take features that others computed, for `clusters`")
    parser.add_argument("features", type=path_argument, metavar="DIR", help="output of clip-retrieval inference")
    parser.add_argument("--shards", type=path_argument, required=True, metavar="DIR", help="verified shard directory")
    add_output(parser)
    parser.add_argument("--by", choices=("key", "sha256"), default="key", help="what names a picture in both")
    parser.add_argument("--model", default="", metavar="NAME", help="what computed them, for the record")
    add_processes(parser)


def _embeddings(options: argparse.Namespace) -> int:
    from data_prep.balancing.foreign_features import take_features

    take_features(
        options.features,
        options.shards,
        options.output,
        by=options.by,
        model=options.model,
        processes=options.processes,
    )
    return 0


def add_clusters(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep clusters`."""
    parser = add_command(commands, "clusters", _clusters, "group the pictures by what they show")
    parser.add_argument("embeddings", type=path_argument, metavar="EMBEDDINGS", help="output of pipeline/embed.py")
    parser.add_argument("--shards", type=path_argument, required=True, metavar="DIR", help="verified shard directory")
    add_output(parser)
    parser.add_argument("--clusters", type=positive, required=True, metavar="K", help="before near ones are merged")
    parser.add_argument(
        "--merge-similarity",
        type=share,
        default=0.7,
        metavar="COSINE",
        help="merge centroids so near; 1: none",
    )
    parser.add_argument(
        "--rows-per-centroid", type=positive, default=1000, metavar="N", help="pictures to find centroids by, at most"
    )
    parser.add_argument("--iterations", type=positive, default=20, metavar="N", help="of k-means, at most")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of the sample and of k-means")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--centroids-only", action="store_true", help="find the centroids, assign no samples")
    work.add_argument(
        "--slice", type=array_slice, metavar="I/N", help="assign share I of N (from 0) of the shards, in an array job"
    )
    add_processes(parser)


def _clusters(options: argparse.Namespace) -> int:
    from data_prep.balancing.clustering import KMeans, cluster

    kmeans = KMeans(
        options.clusters, options.merge_similarity, options.rows_per_centroid, options.iterations, options.seed
    )
    cluster(
        options.embeddings,
        options.shards,
        options.output,
        kmeans,
        processes=options.processes,
        part=options.slice,
        centroids_only=options.centroids_only,
    )
    return 0


def add_balance(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep balance`."""
    parser = add_command(commands, "balance", _balance, "how often to read each sample: large clusters less")
    parser.add_argument(
        "clusters", type=path_argument, nargs="?", metavar="CLUSTERS", help="output of `data-prep clusters`"
    )
    add_output(parser)
    parser.add_argument(
        "--alpha",
        type=share,
        default=0.2,
        metavar="A",
        help="a cluster of n is heard as n^A; 1: thins all alike",
    )
    parser.add_argument(
        "--keep", type=above_zero, default=0.5, metavar="SHARE", help="of all samples to read in an epoch"
    )
    parser.add_argument("--repeat", action="store_true", help="samples of small clusters may come several times")
    parser.add_argument(
        "--default", type=rate, metavar="RATE", help="of samples without one; 0 leaves them out (without it: an error)"
    )
    parser.add_argument("--from-list", type=path_argument, metavar="JSON", help="a published list by SHA-256, instead")
    parser.add_argument("--shards", type=path_argument, metavar="DIR", help="verified shard directory, of --from-list")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that has content")
    add_processes(parser)


def _balance(options: argparse.Namespace) -> int:
    from data_prep.balancing.balance import balance
    from data_prep.balancing.published_rates import balance_from_list

    if options.from_list is not None:
        if options.clusters is not None or options.shards is None:
            raise UserError("--from-list takes --shards DIR, and no CLUSTERS")
        balance_from_list(
            options.from_list,
            options.shards,
            options.output,
            default=options.default,
            processes=options.processes,
            overwrite=options.overwrite,
        )
        return 0
    if options.clusters is None or options.shards is not None:
        raise UserError("name CLUSTERS, the output of `data-prep clusters`; --shards is for --from-list")
    balance(
        options.clusters,
        options.output,
        alpha=options.alpha,
        keep=options.keep,
        repeat=options.repeat,
        default=options.default,
        overwrite=options.overwrite,
    )
    return 0
