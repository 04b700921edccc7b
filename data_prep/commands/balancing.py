"""Commands: clusters of pictures by meaning, and how often to read the samples of each."""

from __future__ import annotations

import argparse

from data_prep.commands.options import (
    Commands,
    add_command,
    add_output,
    add_processes,
    array_slice,
    not_negative,
    positive,
    share,
)
from formats.files import path_argument


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
