"""The random number generators of a process, as tensors.

Nothing that training computes draws from them: masks, crops and captions have generators of their own, by their place
in the run. They are kept so that whatever comes to use them goes on where it stood.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

_PREFIX = "rng/"


def seed_generators(seed: int) -> None:
    """Begin: python's, numpy's and torch's generators, the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
    return {_PREFIX + name: tensor for name, tensor in state.items()}


def load_rng_state(file: Path, device: torch.device) -> None:
    """Set the generators to what `rng_state` returned, now in a file with other tensors."""
    with safe_open(file, framework="pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(_PREFIX)}  # noqa: SIM118
    _set({key.removeprefix(_PREFIX): tensor for key, tensor in state.items()}, device)


def _set(state: Mapping[str, Tensor], device: torch.device) -> None:
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position = state["numpy"].tolist()
    gauss = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, len(gauss), gauss[0] if gauss else 0.0))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
