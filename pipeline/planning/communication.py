"""What one rank sends and receives in a step, by collective; docs/plan.md.

W ranks, B pairs of a rank whose features are exchanged at once, G = B * W, E embed_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.planning.workload import Workload

_FP32 = 4
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True)
class Traffic:
    """One use of a collective in a step.

    payload_bytes: the whole tensor: what is reduced, what all ranks have gathered; of a send what one rank sends
    overlapped: whether it runs beside the backward pass
    """

    purpose: str
    operation: Operation
    payload_bytes: int
    overlapped: bool = False

    def wire_bytes(self, world_size: int) -> float:
        """What a rank sends, as much as it receives, in a ring of all ranks."""
        share = (world_size - 1) / world_size
        return self.payload_bytes * {"all_reduce": 2 * share, "send": 1.0}.get(self.operation, share)


def step_traffic(load: Workload) -> list[Traffic]:
    """All collectives of an optimiser step that carry more than a few numbers; none for one rank."""
    if load.world_size == 1:
        return []
    return [*_weights_and_gradients(load), *_features(load)]


def _weights_and_gradients(load: Workload) -> list[Traffic]:
    A, gradients = load.accumulation_steps, load.gradient_bytes
    weights, muon = load.weight_bytes * load.parameters.total, load.parameters.with_muon
    overlaps = load.overlaps_reduction
    if load.zero_stage == 0:
        return [Traffic("gradients", "all_reduce", gradients)]
    if load.zero_stage < 3:
        # stage 2 has no room for sums over micro-batches but its own share's
        times = A if load.zero_stage == 2 else 1
        return [
            Traffic("gradients", "all_reduce", gradients * times, overlaps),
            Traffic("weights", "all_gather", load.weight_bytes * load.parameters.trained),
            *([Traffic("muon's directions", "all_gather", 2 * muon)] if muon else []),
        ]
    persistent = load.weight_bytes * load.parameters.persistent
    fits = load.parameters.total <= load.max_live  # else they are let go and fetched again for the backward pass
    return [
        Traffic("weights", "all_gather", (weights - persistent) * A * (1 if fits else 2), True),
        Traffic("gradients", "reduce_scatter", gradients * A, overlaps),
        Traffic("small weights", "all_gather", persistent),
    ]


def _features(load: Workload) -> list[Traffic]:
    """The loss's exchange of columns and of what is found at them (training/objectives/feature_exchange.py)."""
    times = 1 if load.cache_gradients else load.accumulation_steps
    B = load.micro_batch_size * (load.accumulation_steps if load.cache_gradients else 1)
    G, E = B * load.world_size, load.model.embed_dim
    softmax = load.loss == "info_nce"
    if load.exchange == "ring":
        columns = (2 if softmax else 1) * (load.world_size - 1) * B * E
        found = load.world_size * B * E
        numbers = (2 * load.world_size - 1) * B if softmax else 0
        return [Traffic("features", "send", _FP32 * (columns + found + numbers) * times)]
    rows = _FP32 * G * times
    traffic = [
        Traffic("features", "all_gather", rows * (E + softmax)),
        Traffic("features", "reduce_scatter", rows * (E + softmax)),
    ]
    return traffic + ([Traffic("features", "all_reduce", rows)] if softmax else [])
