"""How long a step takes: products and memory traffic of the device, the host, and what ranks send; docs/plan.md.

W ranks, B pairs of a rank whose features are exchanged at once, G = B * W, E embed_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.flops import masked_word_flops, step_flops
from pipeline.hardware import Accelerator, Interconnect
from pipeline.planning.memory import text_memory, vision_memory
from pipeline.planning.workload import Workload

# Four constants fitted to the 14 steps of benchmarks/results/gpu_throughput.json: the share of the data sheet's
# products per second; how often what the forward pass keeps crosses the memory's interface at its full rate; what a
# block costs the device whatever its size; and what launching its kernels, forward and backward, costs the host.
PRODUCT_EFFICIENCY = 0.615
TRAFFIC_PER_SAVED_BYTE = 9.8
DEVICE_S_PER_BLOCK = 0.92e-3
HOST_S_PER_BLOCK = 3.4e-3
# Assumed: what collectives reach of a link's rate.
LINK_EFFICIENCY = 0.8
_BACKWARD_SHARE = 2 / 3
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
    """The loss's exchange of columns and of what is found at them (training/feature_exchange.py)."""
    if load.masked_words:
        return []
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


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step. `flops` counts each product of the model once, recomputation not at all."""

    flops: int
    compute_s: float
    host_s: float
    communication_s: float
    exposed_s: float
    step_s: float
    mfu: float


def step_time(load: Workload, accelerator: Accelerator, network: Interconnect, mfu: float | None = None) -> StepTime:
    """The estimate; with `mfu` computing takes what that utilisation says."""
    peak = accelerator.fp32_flops_per_s if load.precision == "fp32" else accelerator.bf16_flops_per_s
    flops = micro_batch_flops(load) * load.accumulation_steps
    again = 1 + (load.checkpoint_blocks + load.cache_gradients) / 3  # forward passes are a third
    blocks = load.blocks * load.accumulation_steps
    host_s = again * HOST_S_PER_BLOCK * blocks
    if mfu is None:
        products_s = flops / (PRODUCT_EFFICIENCY * peak)
        moved_bytes = TRAFFIC_PER_SAVED_BYTE * _saved_bytes(load) * load.accumulation_steps
        compute_s = again * (products_s + moved_bytes / accelerator.memory_bytes_per_s + DEVICE_S_PER_BLOCK * blocks)
        busy_s = max(compute_s, host_s)
    else:
        compute_s = busy_s = flops / (mfu * peak)
    communication_s, exposed_s = _communication(load, accelerator, network, busy_s)
    step_s = busy_s + exposed_s
    return StepTime(flops, compute_s, host_s, communication_s, exposed_s, step_s, flops / (step_s * peak))


def micro_batch_flops(load: Workload) -> int:
    """Operations of one rank for one micro-batch, with all ranks' columns in its loss."""
    pairs = load.micro_batch_size
    lengths = [round(load.text.tokens / pairs)] * pairs
    if load.masked_words:
        return masked_word_flops(load.model.text, lengths, load.masked_words)
    kept = [load.patches // pairs] * pairs
    others = load.global_micro_batch - pairs
    return step_flops(load.model, kept, lengths) + 4 * 2 * pairs * others * load.model.embed_dim


def _saved_bytes(load: Workload) -> int:
    stored = load.without_recomputation()
    return vision_memory(stored).saved + text_memory(stored).saved


def _communication(
    load: Workload, accelerator: Accelerator, network: Interconnect, busy_s: float
) -> tuple[float, float]:
    """(all collectives, what of them is not hidden behind the backward pass)."""
    hidden_s = shown_s = 0.0
    for traffic in step_traffic(load):
        seconds = traffic.wire_bytes(load.world_size) / _bandwidth(traffic, load.world_size, accelerator, network)
        if traffic.overlapped:
            hidden_s += seconds
        else:
            shown_s += seconds
    return hidden_s + shown_s, shown_s + max(0.0, hidden_s - _BACKWARD_SHARE * busy_s)


def _bandwidth(traffic: Traffic, world_size: int, accelerator: Accelerator, network: Interconnect) -> float:
    """Of a ring: within a node its links; between nodes all ports of a node, or one where neighbours send."""
    if world_size <= accelerator.per_node:
        return LINK_EFFICIENCY * accelerator.link_bytes_per_s
    ports = 1 if traffic.operation == "send" else accelerator.per_node
    return LINK_EFFICIENCY * min(accelerator.link_bytes_per_s, ports * network.bytes_per_s)
