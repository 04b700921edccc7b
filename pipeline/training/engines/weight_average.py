"""A moving average of the weights (EMA), which often evaluates better than the weights that training ends with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pipeline.ranks import Ranks
from pipeline.training.checkpoints.checkpoint import AVERAGED_WEIGHTS
from pipeline.training.engines.engine import Engine
from pipeline.training.engines.fragments import find_fragments


class WeightAverage:
    """Of the fp32 weights that the optimizer updates, in the same shares and on the same device. A `Carried`.

    Of a frozen parameter there is no share: its average is itself.

    first_step: of the stage; the average of few weights forgets faster
    """

    name = AVERAGED_WEIGHTS.removesuffix(".safetensors")

    def __init__(self, engine: Engine, decay: float, first_step: int, ranks: Ranks) -> None:
        self._engine = engine
        self._decay = decay
        self._first_step = first_step
        self._ranks = ranks
        holders = {
            id(fragment.holder): fragment.holder.detach()
            for fragment in find_fragments(self._engine.deepspeed).values()
        }
        self._weights = list(holders.values())
        self._averages = [holder.clone() for holder in self._weights]
        self._average_of = dict(zip(holders, self._averages, strict=True))

    def update(self, step: int) -> None:
        """After the weights' update in a step, counted from 0 over the run. Nobody waits."""
        updates = step + 1 - self._first_step
        decay = min(self._decay, updates / (updates + 9))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged model by parameter, in the main rank's memory; nothing on other ranks. Collective."""
        with self._in_place_of_weights():
            return self._engine.weights(self._ranks)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """This rank's shares of an averaged model."""
        for name, fragment in find_fragments(self._engine.deepspeed).items():
            fragment.of_holder(self._average_of[id(fragment.holder)]).copy_(fragment.of_parameter(state[name]))

    @contextlib.contextmanager
    def _in_place_of_weights(self) -> Iterator[None]:
        """What is collected as weights is the average: DeepSpeed knows where each parameter's shares are."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weights, average in zip(self._weights, self._averages, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
