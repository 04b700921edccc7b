"""`data-prep clusters`: features of shards -> centroids -> the cluster of every sample, with a page to look at.

n samples of a shard, K centroids asked for, C clusters after near ones were merged, D width
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.balancing.clusters_page import write_page
from data_prep.balancing.kmeans import draw_sample, import_faiss, index_of, merge_near, nearest, train_centroids
from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import reading
from formats.arrays import array_path, map_array, write_array
from formats.clusters import CENTROIDS, FORMAT_VERSION, NO_CLUSTER, SIZES, SUMMARY, Clusters
from formats.embeddings import Embeddings, open_embeddings
from formats.errors import UserError
from formats.files import make_folder, read_json, write_json
from formats.manifest import MANIFEST, Manifest, Shard, read_manifest

HOW = "centroids.json"  # how the centroids were made; written after them
PAGE = "clusters.html"


@dataclasses.dataclass(frozen=True)
class KMeans:
    """How centroids are made; docs/balance.md says what each is for."""

    centroids: int
    merge_similarity: float
    rows_per_centroid: int
    iterations: int
    seed: int


def cluster(
    features: Path,
    directory: Path,
    output: Path,
    kmeans: KMeans,
    *,
    processes: int,
    part: tuple[int, int] | None = None,
    centroids_only: bool = False,
) -> None:
    """Make what is missing of a folder of clusters (formats.clusters), and say what they are.

    part: (i, n): assign the samples of share i of n of the shards, and no more; centroids must be there
    Raises UserError for features that do not fit, K too large for them, and a folder of other clusters.
    """
    import_faiss()  # what is missing shows before anything is read
    with reading(directory):
        manifest = read_manifest(directory)
        embeddings = open_embeddings(features, manifest)
        how = _how(embeddings, manifest, kmeans)
        if not _has_centroids(output, how):
            if part is not None:
                raise UserError(f"{output} has no centroids yet: run the same with --centroids-only first, then slices")
            _make_centroids(embeddings, output, kmeans, how)
        if centroids_only:
            return
        index, count = part or (0, 1)
        _assign(embeddings, output, manifest.shards[index::count], processes)
        if part is None:
            shutil.copyfile(directory / MANIFEST, output / MANIFEST)
            clusters = _finish(output, manifest, read_json(output / HOW))
            write_page(output / PAGE, directory, clusters, processes)
            _print(clusters, output)
        else:
            print(f"slice {index}/{count} is assigned; when all are, run the same without --slice")


def _how(embeddings: Embeddings, manifest: Manifest, kmeans: KMeans) -> dict[str, Any]:
    known = {name: embeddings.header.get(name, "") for name in ("model", "weights_sha256")}
    return {"manifest_sha256": manifest.sha256, "embeddings": known, **dataclasses.asdict(kmeans)}


def _has_centroids(output: Path, how: Mapping[str, Any]) -> bool:
    path = output / HOW
    if not path.exists():
        return False
    there = read_json(path)
    if differing := [name for name, value in how.items() if there.get(name) != value]:
        raise UserError(f"{path} is of other clusters ({', '.join(differing)} differ): name another --output")
    return True


def _make_centroids(embeddings: Embeddings, output: Path, kmeans: KMeans, how: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix=".sample.", dir=make_folder(output)) as scratch:
        most_rows = kmeans.centroids * kmeans.rows_per_centroid
        sample_SD = draw_sample(embeddings, most_rows, kmeans.seed, Path(scratch) / "sample.npy")
        centroids_KD = train_centroids(sample_SD, kmeans.centroids, kmeans.iterations, kmeans.seed)
        rows_K = np.bincount(nearest(sample_SD, index_of(centroids_KD)), minlength=kmeans.centroids)
        kept, merges = merge_near(centroids_KD, rows_K, kmeans.merge_similarity)
        rows = len(sample_SD)
    number_of = {centroid: number for number, centroid in enumerate(kept)}
    merged = [{"into": number_of[merge.into], "cosine": merge.cosine, "rows": merge.rows} for merge in merges]
    write_array(output / CENTROIDS, centroids_KD[kept])
    write_json(output / HOW, {**how, "sampled_rows": rows, "merged": merged})
    print(
        f"{output / CENTROIDS}: {len(kept):,} centroids of {rows:,} pictures; {len(merges):,} were merged with others"
    )


def _assign(embeddings: Embeddings, output: Path, shards: Sequence[Shard], processes: int) -> None:
    """Write which centroid is nearest, for every sample of the shards that have no such array yet."""
    left = [shard for shard in shards if not _is_assigned(output, shard)]
    assign = functools.partial(_assign_shard, embeddings, output)
    with progress_bar("assign", sum(shard.samples for shard in left), "") as progress:
        for samples in map_in_processes(assign, left, processes, limit=len(left)):
            progress.update(samples)


def _is_assigned(output: Path, shard: Shard) -> bool:
    path = array_path(output, shard)
    try:
        return path.is_file() and map_array(path).shape == (shard.samples,)
    except UserError:
        return False


def _assign_shard(embeddings: Embeddings, output: Path, shard: Shard) -> int:
    write_array(array_path(output, shard), nearest(embeddings.rows(shard), _worker_index(output / CENTROIDS)))
    return shard.samples


@functools.lru_cache(maxsize=1)
def _worker_index(path: Path) -> Any:
    """The centroids, read once in each process, which works with one thread: there are as many of them as cores."""
    import_faiss().omp_set_num_threads(1)
    return index_of(map_array(path))


def _finish(output: Path, manifest: Manifest, how: Mapping[str, Any]) -> Clusters:
    """Count, and write what comes last. Raises UserError if samples are not assigned."""
    count = len(map_array(output / CENTROIDS))
    clusters = Clusters(output, manifest, {}, np.zeros(count, np.int64))
    sizes_C = clusters.sizes_C
    for shard in manifest.shards:
        cluster_n = clusters.of(shard)
        sizes_C += np.bincount(cluster_n[cluster_n != NO_CLUSTER], minlength=count)
    summary = {
        "format_version": FORMAT_VERSION,
        "samples": manifest.num_samples,
        "clusters": count,
        "without_cluster": manifest.num_samples - int(sizes_C.sum()),
        **how,
    }
    write_array(output / SIZES, sizes_C)
    write_json(output / SUMMARY, summary)
    return Clusters(output, manifest, summary, sizes_C)


def _print(clusters: Clusters, output: Path) -> None:
    largest, middle, smallest = np.quantile(clusters.sizes_C, [1, 0.5, 0], method="nearest").tolist()
    print(
        f"{output}: {clusters.summary['samples']:,} samples in {len(clusters.sizes_C):,} clusters, of {smallest:,} to "
        f"{largest:,}, the middle one of {middle:,}"
    )
    if without := clusters.summary["without_cluster"]:
        print(f"{without:,} samples are in none: their pictures have no features (they do not decode)")
    print(output / PAGE)
