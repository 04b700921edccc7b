"""How often to read the samples of each cluster: rates that thin out large ones, and sum up to what was asked for.

Source: DynamiCS (arXiv 2604.27932), whose clusters of n samples are to be heard n^alpha times. There a rate of 1 is the
most, and what is cut off above it is lost; here it is given to the others.

C clusters, n samples of a shard
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Rates = npt.NDArray[np.float16]


def fill(sizes_C: Counts, alpha: float, budget: float, highest: float) -> Floats:
    """Rates p_c = min(highest, x n_c^(alpha - 1)), with x such that the sum of p_c n_c is the budget [C].

    Water-filling: with clusters in the order in which they reach the highest rate, the first k are at it, and what is
    left of the budget decides x for the others. Clusters without samples have rate 0. Raises ValueError for a budget
    below 0, or above what the highest rate gives.
    """
    total = int(sizes_C.sum())
    if not 0 <= budget <= highest * total:
        raise ValueError(f"a budget of {budget} does not fit {total} samples")
    rates_C = np.zeros(len(sizes_C))
    order = np.argsort(sizes_C, kind="stable")  # the smallest has the highest rate, for alpha up to 1
    order = order[sizes_C[order] > 0]
    n_C = sizes_C[order].astype(np.float64)
    weight_C = n_C ** (alpha - 1)
    at_highest_C = np.concatenate([[0], np.cumsum(n_C)[:-1]]) * highest
    others_C = np.cumsum((n_C * weight_C)[::-1])[::-1]
    x_C = (budget - at_highest_C) / others_C  # if the first k are at the highest rate
    is_enough_C = x_C * weight_C <= highest
    first = int(is_enough_C.argmax()) if is_enough_C.any() else len(order)
    rates_C[order[:first]] = highest
    rates_C[order[first:]] = np.clip(x_C[first] * weight_C[first:], 0, highest) if first < len(order) else []
    return rates_C


class StoredRates:
    """Rates as 16-bit floats whose sum over the samples of a cluster is that of its exact rate, to one step of them.

    Of a cluster's samples the first have the next higher float16, the others the next lower. What cannot be expressed
    is carried over to the next cluster, so that the sum over all samples is exact to one step too.
    """

    def __init__(self, rates_C: Floats, sizes_C: Counts, highest: float) -> None:
        nearest_C = rates_C.astype(np.float16)
        self._low_C = np.where(nearest_C > rates_C, np.nextafter(nearest_C, np.float16(0)), nearest_C)
        self._high_C = np.nextafter(self._low_C, np.float16(np.inf))
        low_C, step_C = self._low_C.astype(np.float64), (self._high_C - self._low_C).astype(np.float64)
        self._higher_left_C = np.zeros(len(rates_C), np.int64)
        carried = 0.0
        for cluster in np.argsort(-sizes_C, kind="stable").tolist():
            wanted = sizes_C[cluster] * (rates_C[cluster] - low_C[cluster]) + carried
            most = sizes_C[cluster] if rates_C[cluster] < highest else 0
            higher = int(min(max(0, round(wanted / step_C[cluster])), most))
            self._higher_left_C[cluster] = higher
            carried = wanted - higher * step_C[cluster]

    def of(self, cluster_n: npt.NDArray[np.int32]) -> Rates:
        """The rates of the next samples, all in a cluster, in the manifest's order."""
        order = np.argsort(cluster_n, kind="stable")
        of_cluster_n = cluster_n[order]
        clusters, starts, counts = np.unique(of_cluster_n, return_index=True, return_counts=True)
        place_n = np.arange(len(order)) - np.repeat(starts, counts)  # of a sample among those of its cluster
        is_higher_n = place_n < self._higher_left_C[of_cluster_n]
        rates_n = np.empty(len(order), np.float16)
        rates_n[order] = np.where(is_higher_n, self._high_C[of_cluster_n], self._low_C[of_cluster_n])
        self._higher_left_C[clusters] = np.maximum(0, self._higher_left_C[clusters] - counts)
        return rates_n


def effective_number(weights_C: Floats) -> float:
    """As how many equal clusters these are: the exponential of the entropy of their shares."""
    shares_C = weights_C[weights_C > 0] / weights_C.sum()
    return float(np.exp(-(shares_C * np.log(shares_C)).sum()))
