"""`data-prep balance`: clusters, or a published list -> how often each sample is read (formats.balance).

C clusters, n samples of a shard
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.balancing.rates import Floats, Rates, StoredRates, effective_number, fill
from data_prep.console import print_table, progress_bar
from formats.balance import MAX_RATE, write_balance
from formats.clusters import NO_CLUSTER, Clusters, read_clusters
from formats.errors import UserError


def balance(
    directory: Path, output: Path, *, alpha: float, keep: float, repeat: bool, default: float | None, overwrite: bool
) -> dict[str, Any]:
    """Write rates under which clusters of n samples are heard as n^alpha, of all samples the share `keep`.

    repeat: rates above 1 are allowed: the samples of small clusters come several times
    default: the rate of samples in no cluster
    Returns what balance.json says. Raises UserError for samples without a rate, and a share that cannot be reached.
    """
    clusters = read_clusters(directory)
    samples, without = clusters.manifest.num_samples, int(clusters.summary["without_cluster"])
    highest = MAX_RATE if repeat else 1.0
    if without and default is None:
        raise UserError(
            f"{without:,} samples of {directory} are in no cluster, which leaves them without a rate: --default 0 "
            "leaves them out, another --default reads them as often as it says"
        )
    budget = keep * samples - without * (default or 0.0)
    try:
        rates_C = fill(clusters.sizes_C, alpha, budget, highest)
    except ValueError as error:
        raise UserError(
            f"--keep {keep:g} of {samples:,} samples cannot be reached with rates up to {highest:g}"
            f"{'' if repeat else ': lower it, or allow --repeat'}"
        ) from error
    effective_C = rates_C * clusters.sizes_C
    summary = {
        "clusters": int((clusters.sizes_C > 0).sum()),
        "clusters_at_one": int((rates_C >= 1).sum()),
        "alpha": alpha,
        "keep": keep,
        "repeat": repeat,
        "default": default,
        "without_cluster": without,
        "effective_clusters": {
            "before": effective_number(clusters.sizes_C.astype(np.float64)),
            "after": effective_number(effective_C),
        },
    }
    written = write_balance(output, clusters.manifest, _rates(clusters, rates_C, highest, default), summary, overwrite)
    _print(written, clusters, rates_C, output)
    return written


def _rates(clusters: Clusters, rates_C: Floats, highest: float, default: float | None) -> Iterator[Rates]:
    stored = StoredRates(rates_C, clusters.sizes_C, highest)
    with progress_bar("rates", clusters.manifest.num_samples, "") as progress:
        for shard in clusters.manifest.shards:
            cluster_n = clusters.of(shard)
            is_in_one_n = cluster_n != NO_CLUSTER
            rates_n = np.full(shard.samples, default or 0.0, np.float16)
            rates_n[is_in_one_n] = stored.of(cluster_n[is_in_one_n])
            yield rates_n
            progress.update(shard.samples)


def _print(summary: dict[str, Any], clusters: Clusters, rates_C: Floats, output: Path) -> None:
    order = np.argsort(-clusters.sizes_C, kind="stable")[: summary["clusters"]]
    shown = {"largest": order[0], "middle": order[len(order) // 2], "smallest": order[-1]}
    rows = [
        (name, f"{size:,}", f"{rate:.4g}", f"{size * rate:,.1f}")
        for name, size, rate in ((name, int(clusters.sizes_C[c]), float(rates_C[c])) for name, c in shown.items())
    ]
    print_table(("cluster", "samples", "rate", "read per epoch"), rows)
    effective = summary["effective_clusters"]
    print(
        f"{output}: {summary['achieved_share']:.6f} of {summary['samples']:,} samples per epoch; "
        f"{summary['clusters_at_one']:,} of {summary['clusters']:,} clusters at a rate of 1"
        f"{' or above' if summary['repeat'] else ''}; as many as {effective['before']:,.1f} equal clusters before, "
        f"{effective['after']:,.1f} now"
    )
