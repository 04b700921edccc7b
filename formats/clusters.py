"""CLUSTERS: which cluster each sample of a shard directory is in, by what its picture shows.

    00000.npy  00001.npy  …   int32 [n], one a shard: the number of each usable sample's cluster, -1 for none
    centroids.npy             float32 [C, D], of length 1: a picture is in the cluster whose centroid is nearest
    sizes.npy                 int64 [C], samples in each
    manifest.jsonl            a copy of the shards'
    clusters.json             how the clusters were made, and what became of them; written last

n samples of a shard, C clusters, D width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.arrays import array_path, map_array
from formats.errors import UserError
from formats.files import read_json
from formats.manifest import Manifest, Shard, read_manifest

SUMMARY, CENTROIDS, SIZES = "clusters.json", "centroids.npy", "sizes.npy"
FORMAT_VERSION = 1
NO_CLUSTER = -1
_MAKE_AGAIN = "make the clusters again with `data-prep clusters`"


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Clusters that are whole. `summary`: what clusters.json says; `manifest`: of the shards, as they were."""

    directory: Path
    manifest: Manifest
    summary: Mapping[str, Any]
    sizes_C: npt.NDArray[np.int64]

    def of(self, shard: Shard) -> npt.NDArray[np.int32]:
        """The cluster of each sample of a shard [n], mapped into memory. Raises UserError for what does not fit."""
        path = array_path(self.directory, shard)
        if not path.is_file():
            raise UserError(f"{path} is missing: {_MAKE_AGAIN}")
        cluster_n = map_array(path)
        if cluster_n.shape != (shard.samples,) or cluster_n.dtype != np.int32:
            raise UserError(f"{path} does not have an int32 for each sample of {shard.name}: {_MAKE_AGAIN}")
        if len(cluster_n) and not (cluster_n.min() >= NO_CLUSTER and cluster_n.max() < len(self.sizes_C)):
            raise UserError(f"{path} names clusters that there are not: {_MAKE_AGAIN}")
        return cluster_n

    def centroids(self) -> npt.NDArray[np.float32]:
        """The centroids [C, D], mapped into memory."""
        return map_array(self.directory / CENTROIDS)


def read_clusters(directory: Path) -> Clusters:
    """Open clusters; arrays of shards are checked when they are used. Raises UserError if they are not whole."""
    if not (directory / SUMMARY).is_file():
        raise UserError(f"{directory} has no {SUMMARY}: make clusters with `data-prep clusters`, and let it end")
    summary, manifest = read_json(directory / SUMMARY), read_manifest(directory)
    sizes_C = np.array(map_array(directory / SIZES))
    if sizes_C.ndim != 1 or sizes_C.dtype != np.int64 or not (sizes_C >= 0).all():
        raise UserError(f"{directory / SIZES} does not hold the sizes of clusters: {_MAKE_AGAIN}")
    return Clusters(directory, manifest, summary, sizes_C)
