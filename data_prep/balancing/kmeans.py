"""Spherical k-means by faiss: centroids of length 1, on a sample of the features, near ones merged.

A sample is a file of fp16 that faiss decodes block by block: memory holds the centroids and a block.

S rows of the sample, n of a shard, K centroids, D width
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.console import progress_bar
from formats.embeddings import Embeddings
from formats.errors import UserError

BLOCK_ROWS = 1 << 14
# relative gain of the objective below which another iteration is of no use
_ENOUGH = 1e-4

Rows = npt.NDArray[np.floating[Any]]
UnitRows = npt.NDArray[np.float32]


class Merge(NamedTuple):
    """A centroid that was given up for a larger one that is near: their numbers, cosine, and its rows of the sample."""

    centroid: int
    into: int
    cosine: float
    rows: int


def import_faiss() -> ModuleType:
    """The faiss module; raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"k-means needs faiss, which is not installed ({error}): pip install 'cluster-clip[balance]', or faiss-cpu"
        ) from error
    return faiss


def unit_rows(rows_nD: Rows) -> tuple[UnitRows, npt.NDArray[np.bool_]]:
    """Rows in fp32, of length 1, and which of them have a direction: the others are not finite, or zero."""
    units_nD = rows_nD.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        length_n = np.linalg.norm(units_nD, axis=1)
    usable_n = np.isfinite(length_n) & (length_n > 0)
    units_nD[~usable_n] = 0
    units_nD[usable_n] /= length_n[usable_n, None]
    return units_nD, usable_n


def draw_sample(embeddings: Embeddings, most_rows: int, seed: int, path: Path) -> npt.NDArray[np.float16]:
    """At most `most_rows` of the features that have a direction, drawn evenly, as a file; fp16 [S, D], mapped."""
    counts = np.array([shard.samples for shard in embeddings.shards])
    wanted = min(most_rows, int(counts.sum()))
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(counts, wanted, method="marginals")
    sample_SD = np.lib.format.open_memmap(path, "w+", np.float16, (wanted, embeddings.width))
    end = 0
    with progress_bar("sample", wanted, "") as progress:
        for number, (shard, count) in enumerate(zip(embeddings.shards, drawn.tolist(), strict=True)):
            if count:
                rng = np.random.default_rng([seed, number])
                chosen_n = np.sort(rng.choice(shard.samples, count, replace=False))
                units_nD, usable_n = unit_rows(embeddings.rows(shard)[chosen_n])
                start, end = end, end + int(usable_n.sum())
                sample_SD[start:end] = units_nD[usable_n]
            progress.update(count)
    return sample_SD[:end]


def train_centroids(sample_SD: npt.NDArray[np.float16], clusters: int, iterations: int, seed: int) -> UnitRows:
    """K centroids of length 1 [K, D]: Lloyd's iterations, until they gain no more or `iterations` are done.

    Raises UserError for more clusters than rows.
    """
    if len(sample_SD) < clusters:
        raise UserError(
            f"--clusters {clusters:,} is more than the {len(sample_SD):,} pictures with features: there would be none "
            "in some; choose fewer"
        )
    faiss = import_faiss()
    width = sample_SD.shape[1]
    codec = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16)
    index = _on_gpus(faiss, faiss.IndexFlatIP(width))
    clustering = faiss.Clustering(width, clusters)
    clustering.seed, clustering.niter, clustering.spherical = seed, 1, True
    # the sample is all to be used, and how many rows a centroid has is for its user to say
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(sample_SD)
    objective = 0.0
    with progress_bar("k-means", iterations, "iteration") as progress:
        for _ in range(iterations):  # each goes on from the centroids of the one before
            clustering.train_encoded(sample_SD.view(np.uint8), codec, index)
            before, objective = objective, clustering.iteration_stats.at(clustering.iteration_stats.size() - 1).obj
            progress.update()
            if objective - before <= _ENOUGH * objective:
                break
    centroids_KD: UnitRows = faiss.vector_to_array(clustering.centroids).reshape(clusters, width)
    return unit_rows(centroids_KD)[0]


def nearest(rows_nD: Rows, index: Any) -> npt.NDArray[np.int32]:
    """The number of the centroid nearest to each row [n], -1 for a row without a direction; `index`: of centroids."""
    nearest_n = np.full(len(rows_nD), -1, np.int32)
    for block in _blocks(len(rows_nD)):
        units_nD, usable_n = unit_rows(rows_nD[block])
        nearest_n[block] = np.where(usable_n, index.search(units_nD, 1)[1][:, 0], -1)
    return nearest_n


def index_of(centroids_KD: UnitRows) -> Any:
    """What `nearest` looks in: exact, by inner product."""
    faiss = import_faiss()
    index = faiss.IndexFlatIP(centroids_KD.shape[1])
    index.add(np.ascontiguousarray(centroids_KD))
    return _on_gpus(faiss, index)


def merge_near(
    centroids_KD: UnitRows, rows_K: npt.NDArray[np.int64], similarity: float
) -> tuple[list[int], list[Merge]]:
    """Which centroids stay, largest first, and which are given up for one that stays and is at least so similar.

    rows_K: rows of the sample that are nearest to each. The outcome does not depend on how centroids are numbered.
    """
    order = sorted(range(len(centroids_KD)), key=lambda number: (-rows_K[number], centroids_KD[number].tobytes()))
    kept, merges = list[int](), list[Merge]()
    for block in _blocks(len(order), 1024):
        numbers = order[block]
        candidates_KD = centroids_KD[numbers]
        # similarities to what stayed of the blocks before, then to all of this block
        similarity_KK = candidates_KD @ centroids_KD[kept + numbers].T
        may_take_in_K = np.zeros(len(kept) + len(numbers), bool)
        may_take_in_K[: len(kept)] = True
        before, columns = len(kept), kept + numbers
        for row, number in enumerate(numbers):
            cosines_K = np.where(may_take_in_K, similarity_KK[row], -np.inf)
            best = int(cosines_K.argmax())
            if cosines_K[best] >= similarity:
                merges.append(Merge(number, columns[best], round(float(cosines_K[best]), 4), int(rows_K[number])))
            else:
                kept.append(number)
                may_take_in_K[before + row] = True
    return kept, merges


def _blocks(rows: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, rows, size))


def _on_gpus(faiss: ModuleType, index: Any) -> Any:
    """The index on all GPUs, where faiss is built for them and there are any."""
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() > 0 else index
