"""Clusters and rates: rows assigned a second, beside faiss's own search; the share of samples that rates really give.

Assignment: features in fp16, mapped, each row checked and brought to length 1, as `data-prep clusters` does it; beside
a flat search of the same rows, already fp32 and of length 1. Both on one core, in turn. Shares: half of 213 million
samples is asked for, in 30,000 clusters of several distributions of sizes; ours is summed over the rates as stored.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from record import record

from data_prep.balancing.kmeans import import_faiss, index_of, nearest, unit_rows
from data_prep.balancing.rates import StoredRates, fill

WIDTH = 768
ALPHA, KEEP = 0.2, 0.5
CLUSTERS, SAMPLES = 30_000, 213_000_000


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16_384, help="to assign in a round (default: %(default)s)")
    parser.add_argument("--centroids", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the simulation (default: %(default)s)")
    options = parser.parse_args()
    rows_per_s = measure_assignment(options.rows, options.centroids, options.rounds)
    shares = simulate_shares(options.samples)
    worst = {name: max(of_shape.values(), key=lambda share: abs(share - KEEP)) for name, of_shape in shares.items()}
    figures = {
        "assign_over_faiss": rows_per_s["ours"] / rows_per_s["faiss"],
        "assigned_rows_per_s_and_core": rows_per_s,
        "simulated_share": worst,
        "simulated_share_by_sizes": shares,
    }
    command = f"python benchmarks/balance_clusters.py --rows {options.rows} --centroids {options.centroids}"
    note = f"{WIDTH} numbers a row; simulated_share: of all distributions of sizes the one farthest from {KEEP}"
    print(figures)
    print(record("balance", figures, command, options.rounds, keep_others=True, note=note))


def measure_assignment(rows: int, centroids: int, rounds: int) -> dict[str, float]:
    """Rows a second on one core, medians of rounds in which both take their turn."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    index = index_of(unit_rows(rng.normal(size=(centroids, WIDTH)))[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, rng.normal(size=(rows, WIDTH)).astype(np.float16))
        mapped_nD = np.load(path, mmap_mode="r")
        units_nD, _ = unit_rows(mapped_nD)
        times_s: dict[str, list[float]] = {"ours": [], "faiss": []}
        for _ in range(rounds):
            times_s["ours"].append(_time_s(lambda: nearest(mapped_nD, index)))
            times_s["faiss"].append(_time_s(lambda: index.search(units_nD, 1)))
    return {name: rows / float(np.median(of_name)) for name, of_name in times_s.items()}


def _time_s(work: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def simulate_shares(samples: int) -> dict[str, dict[str, float]]:
    """The share of all samples that is read on average, where KEEP was asked for: ours, and by the released rule."""
    rng = np.random.default_rng(0)
    places = np.arange(1, CLUSTERS + 1)
    sizes = {f"lognormal {sigma:g}": rng.lognormal(0, sigma, CLUSTERS) for sigma in (0.8, 1.0, 1.5, 2.0)}
    sizes |= {f"Zipf {exponent:g}": places**-exponent for exponent in (0.7, 1.0)}
    shares: dict[str, dict[str, float]] = {"ours": {}, "released": {}}
    for name, of_shape in sizes.items():
        sizes_C = np.maximum(1, np.round(of_shape / of_shape.sum() * samples)).astype(np.int64)
        shares["ours"][name] = _our_share(sizes_C)
        shares["released"][name] = _released_share(sizes_C)
    return shares


def _our_share(sizes_C: npt.NDArray[np.int64]) -> float:
    stored = StoredRates(fill(sizes_C, ALPHA, KEEP * float(sizes_C.sum()), 1.0), sizes_C, 1.0)
    read = [stored.of(np.full(size, cluster, np.int32)).sum(dtype=np.float64) for cluster, size in enumerate(sizes_C)]
    return float(np.sum(read) / sizes_C.sum())


def _released_share(sizes_C: npt.NDArray[np.int64]) -> float:
    """The released cluster_scaling.py: p = round(m / n, 6), m as n^alpha; a sample with p >= 1 comes once."""
    m_C = np.round(KEEP * sizes_C.sum() * sizes_C**ALPHA / (sizes_C**ALPHA).sum())
    return float((np.minimum(1, np.round(m_C / sizes_C, 6)) * sizes_C).sum() / sizes_C.sum())


if __name__ == "__main__":
    main()
