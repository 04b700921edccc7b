"""95 % intervals of metrics, by the bootstrap over images; by Wilson's formula where it knows none.

What a task measures is kept as outcomes, one per image or caption; a metric is their mean, or the mean over groups
(classes, categories) of the means of each. Images are drawn anew with replacement, each with all that belongs to it.

N outcomes, U units (images), G groups, R resamples, B resamples at once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
_SEED = 0
_AT_ONCE = 10
_SPREAD = torch.tensor([0.025, 0.975], dtype=torch.float64)
_Z = 1.959964  # of the normal distribution, 95 % lie within so many standard deviations


@dataclass(frozen=True)
class Outcomes:
    """What a metric is the mean of.

    values_N: float, what each outcome counts, in [0, 1]
    unit_N: int64, the image to which each belongs, from 0; by default each is an image of its own
    group_N: int64, from 0; the metric is then the mean over the groups that occur
    """

    values_N: Tensor
    unit_N: Tensor | None = None
    group_N: Tensor | None = None

    @property
    def mean(self) -> float:
        """The metric."""
        weights_1N = torch.ones(1, len(self.values_N), dtype=torch.float64)
        return self.weighted_means(weights_1N).item()

    def weighted_means(self, weights_BN: Tensor) -> Tensor:
        """The metric [B] when each outcome counts as often as `weights_BN` says, float64."""
        weighted_BN = weights_BN * self.values_N.double()
        if self.group_N is None:
            return weighted_BN.sum(1) / weights_BN.sum(1)
        shape = (len(weights_BN), int(self.group_N.max()) + 1)
        sum_BG = weighted_BN.new_zeros(shape).index_add_(1, self.group_N, weighted_BN)
        count_BG = weighted_BN.new_zeros(shape).index_add_(1, self.group_N, weights_BN)
        mean_BG = torch.where(count_BG > 0, sum_BG / count_BG, torch.nan)  # some resamples miss a group
        return mean_BG.nanmean(1)


def means(outcomes: Mapping[str, Outcomes]) -> dict[str, float]:
    """The metrics themselves."""
    return {name: outcome.mean for name, outcome in outcomes.items()}


def intervals(outcomes: Mapping[str, Outcomes]) -> dict[str, list[float]]:
    """Lower and upper end of the 95 % interval of each metric, from the same resamples where units are the same."""
    by_units: dict[int, list[str]] = {}
    for name, outcome in outcomes.items():
        by_units.setdefault(_units(outcome), []).append(name)
    result: dict[str, list[float]] = {}
    for units, names in by_units.items():

        def means(weights_BU: Tensor, names: list[str] = names) -> Tensor:
            rows = []
            for name in names:
                unit_N = outcomes[name].unit_N
                rows.append(outcomes[name].weighted_means(weights_BU if unit_N is None else weights_BU[:, unit_N]))
            return torch.stack(rows, 1)

        result.update(zip(names, percentile_intervals(units, means), strict=True))
    return {name: result[name] for name in outcomes}


def percentile_intervals(units: int, estimate: Callable[[Tensor], Tensor]) -> list[list[float]]:
    """The interval of each of M estimates, given as a function of how often units count: [B, U] -> [B, M]."""
    estimates_RM = torch.cat([estimate(weights_BU) for weights_BU in _resamples(units)])
    ends_2M = torch.nanquantile(estimates_RM, _SPREAD, dim=0)
    # six digits: sums may differ in their last bits between machines
    rounded = [[round(end, 6) for end in ends] for ends in ends_2M.T.tolist()]
    return [wilson_interval(low, units) if low == high else [low, high] for low, high in rounded]


def wilson_interval(share: float, units: int) -> list[float]:
    """Wilson's interval of a share of so many units (Wilson 1927, without correction for continuity).

    It says something where all outcomes are the same, and the bootstrap nothing: of 50 hits of 50, from 0.929 to 1.
    """
    weight = _Z**2 / units
    middle, half = share + weight / 2, _Z * math.sqrt((share * (1 - share) + weight / 4) / units)
    return [round(max(0.0, (middle - half) / (1 + weight)), 6), round(min(1.0, (middle + half) / (1 + weight)), 6)]


def _resamples(units: int) -> Iterator[Tensor]:
    """How often each unit is drawn, [B, U], float64; the same sequence for the same number of units."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    for _ in range(RESAMPLES // _AT_ONCE):
        drawn_BU = generator.integers(units, size=(_AT_ONCE, units), dtype=np.int64)
        counts = [np.bincount(drawn_U, minlength=units) for drawn_U in drawn_BU]
        yield torch.from_numpy(np.stack(counts)).double()


def _units(outcome: Outcomes) -> int:
    return len(outcome.values_N) if outcome.unit_N is None else int(outcome.unit_N.max()) + 1
