"""Norms of gradients, weights and updates of each tower, from what every rank's optimizer updates anyway.

Only where asked for, at logged steps: the update is what changed against a copy, made when activations are gone.

T towers, 3 sums of squares: gradients, weights, updates
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from pipeline.ranks import Ranks
from pipeline.training.engines.fragments import Fragment, find_fragments

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# First parts of parameters' names; what is in no tower, temperature and bias, has a norm of its own.
_TOWERS = {"visual": "image", "text": "text"}
TOWERS = (*_TOWERS.values(), "temperature")
_GRADIENT, _WEIGHT, _UPDATE = range(3)


class TowerNorms:
    """Measures the updates between `begin` and `read`; costs nothing otherwise."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums_T3: Tensor | None = None
        self._before: list[tuple[Fragment, Tensor]] = []
        self._by_holder: dict[int, list[Fragment]] = {}
        for fragment in find_fragments(engine).values():
            self._by_holder.setdefault(id(fragment.holder), []).append(fragment)
        optimizer = engine.basic_optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]

    def begin(self) -> None:
        """Measure the update that comes next."""
        self._sums_T3 = torch.zeros(len(TOWERS), 3, device=self._ranks.device)

    def read(self, grad_norm: float | None) -> dict[str, float]:
        """Norms over all ranks of the update that was measured, {} if none was. Collective; waits for the device.

        grad_norm: of all gradients, before clipping and without loss scaling; the towers' have their shares of it
        """
        sums_T3, self._sums_T3 = self._sums_T3, None
        if sums_T3 is None:
            return {}
        if self._ranks.world_size > 1:
            dist.all_reduce(sums_T3)
        total = float(sums_T3[:, _GRADIENT].sum())
        norms: dict[str, float] = {}
        for tower, (gradient, weight, update) in zip(TOWERS, sums_T3.tolist(), strict=True):
            if grad_norm is not None and total > 0:
                norms[f"grad_norm_{tower}"] = grad_norm * (gradient / total) ** 0.5
            norms[f"weight_norm_{tower}"] = weight**0.5
            norms[f"update_norm_{tower}"] = update**0.5
        return norms

    def close(self) -> None:
        """Let go of the engine."""
        for hook in self._hooks:
            hook.remove()

    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each of the optimizer's steps; ZeRO makes one for every group of parameters."""
        if self._sums_T3 is None:
            return
        for group in optimizer.param_groups:
            for holder in group["params"]:
                for fragment in self._by_holder.get(id(holder), ()):
                    weights = fragment.of_holder(holder)
                    self._add(fragment, _WEIGHT, weights)
                    if holder.grad is not None:
                        self._add(fragment, _GRADIENT, fragment.of_holder(holder.grad))
                    self._before.append((fragment, weights.clone()))

    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for fragment, before in self._before:
            self._add(fragment, _UPDATE, fragment.of_holder(fragment.holder) - before)
        self._before = []

    def _add(self, fragment: Fragment, column: int, values: Tensor) -> None:
        assert self._sums_T3 is not None
        tower = TOWERS.index(_TOWERS.get(fragment.name.partition(".")[0], TOWERS[-1]))
        square = torch.linalg.vector_norm(values, dtype=torch.float32).square()
        # without ZeRO every rank has all of it
        self._sums_T3[tower, column] += square if fragment.is_only_copy else square / self._ranks.world_size
