"""What each rank keeps of its own, `rank_00000.safetensors`: its part of the optimizer's state, and its generators.

The state is kept by parameter name: what one cut of the weights wrote, another reads. An optimizer keeps, for each
parameter, tensors of its size (AdamW's moments, Muon's momentum) and numbers (steps taken). Each rank gives what it has
of the former as `KIND/PARAMETER@START`, the elements from START on; a number has no shape. Beside them are the numbers
of a dynamic loss scaler, if there is one.

Nothing that training computes draws from the generators: masks, crops and captions have some of their own, by their
place in the run. They are kept so that whatever comes to use them goes on where it stood.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from formats.errors import UserError
from pipeline.ranks import Ranks
from pipeline.training.engines.fragments import Fragment, find_fragments

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SCALER = "loss_scaler/"
# What changes in DeepSpeed's dynamic loss scalers while they work.
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_RNG = "rng/"


def optimizer_state(engine: DeepSpeedEngine, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's share of the state, in the CPU's memory; together the ranks give each element once."""
    state = {}
    for fragment in _share(list(find_fragments(engine).values()), ranks):
        for kind, value in engine.basic_optimizer.state.get(fragment.holder, {}).items():
            key = f"{kind}/{fragment.name}@{fragment.start}"
            if isinstance(value, Tensor) and value.shape == fragment.holder.shape:
                state[key] = fragment.of_holder(value).to("cpu", copy=True)
            else:
                state[key] = _tensor_of_number(value)
    scaler = _dynamic_scaler(engine)
    fields = [field for field in _SCALER_FIELDS if hasattr(scaler, field)]
    return state | {_SCALER + field: _tensor_of_number(getattr(scaler, field)) for field in fields}


def _share(fragments: list[Fragment], ranks: Ranks) -> Iterable[Fragment]:
    """What this rank writes: all that it alone has, an equal part of what all have."""
    total, before = sum(fragment.length for fragment in fragments), 0
    for fragment in fragments:
        if fragment.is_only_copy or before * ranks.world_size // total == ranks.rank:
            yield fragment
        before += fragment.length


def load_optimizer_state(engine: DeepSpeedEngine, files: Iterable[Path]) -> None:
    """Take this rank's part out of what `optimizer_state` gave on the ranks of some world, now in files.

    Files are read until this rank has all; of one that has nothing for it only the header. Raises UserError if
    elements are missing.
    """
    fragments = find_fragments(engine)
    loaded: Counter[tuple[str, str]] = Counter()
    incomplete: list[tuple[str, str]] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no mapping
                kind, _, place = key.partition("/")
                name, _, start = place.rpartition("@")
                if key.startswith(_SCALER):
                    _set_scaler(engine, place, _number(file.get_tensor(key)))
                elif name in fragments:
                    state = engine.basic_optimizer.state.setdefault(fragments[name].holder, {})
                    loaded[kind, name] += _load_part(state, kind, fragments[name], file, key, int(start))
        incomplete = [part for part, length in loaded.items() if length < fragments[part[1]].length]
        if not incomplete and len({name for _, name in loaded}) == len(fragments):
            return
    if incomplete:
        kind, name = incomplete[0]
        found, wanted = loaded[kind, name], fragments[name].length
        raise UserError(f"of {kind} of {name} there are {found:,} of the {wanted:,} elements that are this rank's")


def _load_part(state: dict[str, Any], kind: str, fragment: Fragment, file: Any, key: str, start: int) -> int:
    """Copy what a stored part and this rank's fragment have in common; returns how many elements that is."""
    part = file.get_slice(key)
    if not part.get_shape():
        number = _number(file.get_tensor(key))
        state[kind] = number.to(fragment.holder.device) if isinstance(number, Tensor) else number
        return fragment.length
    first = max(start, fragment.start)
    end: int = min(start + part.get_shape()[0], fragment.start + fragment.length)
    if first >= end:
        return 0
    if kind not in state:
        state[kind] = torch.zeros_like(fragment.holder, requires_grad=False)
    mine = fragment.of_holder(state[kind])
    mine[first - fragment.start : end - fragment.start].copy_(part[first - start : end - start])
    return end - first


def _tensor_of_number(value: Any) -> Tensor:
    """A number of the optimizer's, int, float or tensor without a shape, for a file of tensors."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise UserError(f"an optimizer that keeps tensors of shape {tuple(value.shape)} cannot be saved in parts")
        return value.detach().to("cpu", copy=True)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _number(tensor: Tensor) -> Any:
    """What `_tensor_of_number` was given; optimizers have no tensors of int64 and float64."""
    return tensor.item() if tensor.dtype in (torch.int64, torch.float64) else tensor


def _dynamic_scaler(engine: DeepSpeedEngine) -> Any:
    """DeepSpeed's loss scaler, if it adapts, else None."""
    optimizer: Any = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    is_dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return scaler if is_dynamic else None


def _set_scaler(engine: DeepSpeedEngine, field: str, value: Any) -> None:
    scaler = _dynamic_scaler(engine)
    if scaler is not None and hasattr(scaler, field):
        setattr(scaler, field, value)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of python's, numpy's, torch's and the device's generator."""
    _, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    assert name == "MT19937", name
    state = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached_gauss] if has_gauss else [], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {_RNG + name: tensor for name, tensor in state.items()}


def load_rng_state(file: Path, device: torch.device) -> None:
    """Set the generators to what `rng_state` returned, now in a file with other tensors."""
    with safe_open(file, framework="pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(_RNG)}  # noqa: SIM118
    _set_generators({key.removeprefix(_RNG): tensor for key, tensor in state.items()}, device)


def _set_generators(state: Mapping[str, Tensor], device: torch.device) -> None:
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position = state["numpy"].tolist()
    gauss = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, len(gauss), gauss[0] if gauss else 0.0))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
