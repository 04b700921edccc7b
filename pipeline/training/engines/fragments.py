"""Which part of which parameter a rank's optimizer updates: the one place that knows how ZeRO's stages cut the weights.

Stage 0 cuts nothing. Stages 1 and 2 lay a group's parameters end to end and give each rank an equal part; stage 3 gives
each rank an equal part of every parameter. Either way a rank has ranges of flattened parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.ranks import Ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Fragment:
    """`length` elements from `start` on of the flattened parameter `name`.

    holder: the fp32 tensor that the optimizer steps, of this parameter alone or of parts of many
    offset: where in the flattened holder the fragment begins
    is_only_copy: whether no other rank updates these elements
    """

    name: str
    start: int
    length: int
    holder: Tensor
    offset: int
    is_only_copy: bool

    def of_holder(self, tensor: Tensor) -> Tensor:
        """The fragment of a tensor with the holder's shape, a view [length]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]

    def of_parameter(self, tensor: Tensor) -> Tensor:
        """The fragment of a tensor with the parameter's shape, [length]."""
        return tensor.detach().reshape(-1)[self.start : self.start + self.length]


def find_fragments(engine: DeepSpeedEngine) -> dict[str, Fragment]:
    """What this rank's optimizer updates, by parameter, of which a rank never has two parts."""
    find = {0: _find_uncut, 3: _find_of_parameters}.get(engine.zero_optimization_stage(), _find_of_groups)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return {fragment.name: fragment for fragment in find(engine, names) if fragment.length > 0}


def _find_uncut(engine: DeepSpeedEngine, names: dict[int, str]) -> Iterator[Fragment]:
    groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    # with bf16 or fp16 the optimizer has fp32 copies, in the same order as the parameters
    for parameters, holders in zip(getattr(engine.optimizer, "fp16_groups", groups), groups, strict=True):
        for parameter, holder in zip(parameters, holders, strict=True):
            yield Fragment(names[id(parameter)], 0, parameter.numel(), holder, 0, is_only_copy=False)


def _find_of_groups(engine: DeepSpeedEngine, names: dict[int, str]) -> Iterator[Fragment]:
    for parameter in engine.module.parameters():
        part: Any = getattr(parameter, "_hp_mapping", None)
        if part is not None:
            (holder,) = engine.basic_optimizer.param_groups[part.param_group_index]["params"]
            place, in_holder = part.lp_fragment_address, part.hp_fragment_address
            yield Fragment(names[id(parameter)], place.start, place.numel, holder, in_holder.start, is_only_copy=True)


def _find_of_parameters(engine: DeepSpeedEngine, names: dict[int, str]) -> Iterator[Fragment]:
    optimizer: Any = engine.optimizer
    for group, holder in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        for parameter in group:
            _, offset, padded_length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = torch.distributed.get_rank() * padded_length
            length = min(padded_length, parameter.ds_numel - start)
            yield Fragment(names[id(parameter)], start, length, holder, offset, is_only_copy=True)


def full_weights(engine: DeepSpeedEngine, ranks: Ranks) -> dict[str, Tensor]:
    """The fp32 weights in the main rank's memory, whatever the ZeRO stage; nothing on other ranks. Collective."""
    fragments = find_fragments(engine)
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = _full_weight(parameter, fragments.get(name))
        if ranks.is_main:
            weights[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
    return weights


def _full_weight(parameter: nn.Parameter, fragment: Fragment | None) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    full: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is not None:
        return full
    if fragment is not None:  # stage 0 cuts nothing
        return fragment.holder
    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):  # frozen: there is no fp32 copy
        return parameter.data.clone()


def load_full_weights(engine: DeepSpeedEngine, file: Path) -> None:
    """Give the engine fp32 weights, `full_weights` in a file: the optimizer its part, the model all. Collective."""
    fragments = find_fragments(engine)
    with _whole_copies_made_anew(engine), safe_open(file, framework="pt") as weights, torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            full = weights.get_tensor(name)
            fragment = fragments.get(name)
            if fragment is not None:
                fragment.of_holder(fragment.holder).copy_(fragment.of_parameter(full))
            if hasattr(parameter, "ds_tensor"):
                part = full.reshape(-1)[parameter.ds_tensor.numel() * torch.distributed.get_rank() :]
                part = part[: parameter.ds_tensor.numel()]  # the last one is shorter
                parameter.ds_tensor.data[: part.numel()].copy_(part)
            else:
                parameter.data.copy_(full)


@contextlib.contextmanager
def _whole_copies_made_anew(engine: DeepSpeedEngine) -> Iterator[None]:
    """Of small parameters stage 3 keeps whole copies once they were used: they are to show what is done to the parts.

    Those that are not there yet are left so: DeepSpeed notes at the first steps in which order parameters are fetched.
    """
    optimizer: Any = engine.optimizer
    kept = [
        parameter
        for parameter in getattr(optimizer, "persistent_parameters", [])
        if parameter.ds_status.name == "AVAILABLE"
    ]
    if kept:
        kept[0].partition(kept)
    yield
    if kept:
        kept[0].all_gather(kept)
    if hasattr(optimizer, "invalidate_secondary_tensor"):
        optimizer.invalidate_secondary_tensor()  # ZeRO++ keeps a second copy of the parts
