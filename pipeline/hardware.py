"""Accelerators and networks: the figures of their data sheets (docs/plan.md names them)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from formats.errors import UserError, nearest_of

_GIB = 1 << 30


@dataclass(frozen=True)
class Accelerator:
    """One device and the node it sits in.

    bf16_flops_per_s: dense products in bf16, or in fp16 where there is no bf16; fp32_flops_per_s: without TF32
    memory_bytes: what a program finds free on an empty device, less than the data sheet's
    link_bytes_per_s: to the other devices of the node, each way
    has_bf16: and the flash attention that came with it
    """

    name: str
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float
    per_node: int = 8
    has_bf16: bool = True

    def with_memory(self, gibibytes: float) -> Accelerator:
        """The same with another memory."""
        return replace(self, memory_bytes=int(gibibytes * _GIB))


@dataclass(frozen=True)
class Interconnect:
    """The network between nodes; bytes/s each way for one device when all devices of a node send at once."""

    name: str
    bytes_per_s: float


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("b200", 2250e12, 75e12, 178 * _GIB, 8.0e12, 900e9),
        Accelerator("h200", 989e12, 67e12, 139 * _GIB, 4.8e12, 450e9),
        Accelerator("h100", 989e12, 67e12, 79 * _GIB, 3.35e12, 450e9),
        Accelerator("h100-pcie", 756e12, 51e12, 79 * _GIB, 2.0e12, 64e9),
        Accelerator("a100", 312e12, 19.5e12, 79 * _GIB, 2.0e12, 300e9),
        Accelerator("a100-40gb", 312e12, 19.5e12, 39 * _GIB, 1.55e12, 300e9),
        Accelerator("l40s", 362e12, 91.6e12, 44 * _GIB, 0.864e12, 32e9),
        Accelerator("a10", 125e12, 31.2e12, 22 * _GIB, 0.6e12, 32e9),
        Accelerator("v100", 125e12, 15.7e12, 31 * _GIB, 0.9e12, 150e9, has_bf16=False),
        Accelerator("rtx4090", 165e12, 82.6e12, 23 * _GIB, 1.01e12, 32e9),
    )
}

INTERCONNECTS = {
    network.name: network
    for network in (
        Interconnect("ndr", 50e9),  # a 400 Gbit/s port for each device
        Interconnect("hdr", 25e9),  # 200 Gbit/s each
        Interconnect("ethernet-400", 6.25e9),  # Gbit/s of a node, shared by eight devices
        Interconnect("ethernet-100", 1.56e9),
        Interconnect("ethernet-25", 0.39e9),
    )
}


def find_accelerator(name: str) -> Accelerator:
    """The named one, in capitals or not; UserError with the nearest."""
    if name.lower() not in ACCELERATORS:
        raise UserError(f"no data of a GPU {name!r}{nearest_of(name, ACCELERATORS)}")
    return ACCELERATORS[name.lower()]


def accelerator_of(device_name: str) -> Accelerator | None:
    """The accelerator that calls itself so, e.g. "NVIDIA A100-SXM4-40GB"; None for one that is not listed."""
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    # of names that all fit, the one that says most
    fitting = [name for name in ACCELERATORS if all(part in "".join(words) for part in name.split("-"))]
    fitting = [name for name in fitting if name.split("-")[0] in words or name.split("-")[0] in "".join(words[-2:])]
    return ACCELERATORS[max(fitting, key=len)] if fitting else None


def find_interconnect(name: str) -> Interconnect:
    """The named one, or a number of GB/s for each device; UserError with the nearest."""
    if name.lower() in INTERCONNECTS:
        return INTERCONNECTS[name.lower()]
    try:
        gigabytes_per_s = float(name)
    except ValueError:
        raise UserError(
            f"no data of an interconnect {name!r}{nearest_of(name, INTERCONNECTS)}, or give GB/s for each GPU, each way"
        ) from None
    if not 0 < gigabytes_per_s < math.inf:
        raise UserError(f"an interconnect of {name} GB/s sends nothing: give a number above 0, or a name")
    return Interconnect(f"{gigabytes_per_s:g} GB/s", gigabytes_per_s * 1e9)
