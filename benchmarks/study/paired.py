"""Means over seeds with intervals, and differences of arms that share their seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy import stats

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval by Student's t, the standard deviation, and of how many. None: of one value."""

    mean: float
    low: float | None
    high: float | None
    sd: float | None
    n: int

    def rounded(self) -> dict[str, float | None]:
        """For a record."""
        return {name: None if value is None else round(value, 5) for name, value in asdict(self).items()}


def estimate(values: Sequence[float]) -> Estimate:
    """Of independent values."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Estimate(mean, None, None, None, n)
    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, sd, n)


def paired_p(differences: Sequence[float]) -> float | None:
    """Of the paired t-test, two-sided: how often as large a mean difference, if there were none."""
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return None
    t = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction over all comparisons: each is significant at a level that it is not above."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected
