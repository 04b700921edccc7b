"""What a stage trains for: the recipe's loss over all ranks' pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import UserError
from model.clip import CLIPOutput
from model.loss import Exchange, Objective, OwnColumns
from model.loss_tiles import make_tiles
from pipeline.ranks import Ranks
from pipeline.recipe import LossSection
from pipeline.training.objectives.feature_exchange import GatheredColumns, RingColumns
from pipeline.training.objectives.grad_cache import CachedLoss


@dataclass(frozen=True)
class TrainingObjective:
    """A loss of pairs, taken of each micro-batch or, with `cache_gradients`, of all those of a step at once."""

    pairs: Objective
    cache_gradients: bool

    def for_step(
        self, encode: Callable[[int], CLIPOutput], num_micro_batches: int
    ) -> Callable[[int, CLIPOutput], Tensor]:
        """The loss of micro-batch n, given what `encode(n)` returns; its mean over micro-batches is the step's.

        encode: called here too, without gradient, for every micro-batch of `cache_gradients`: it must repeat itself
        """
        if not self.cache_gradients or num_micro_batches == 1:
            return lambda _, output: self.pairs(*output)
        with torch.no_grad():
            outputs = [encode(number) for number in range(num_micro_batches)]
        return CachedLoss(self.pairs, outputs)


def make_objective(section: LossSection, ranks: Ranks) -> TrainingObjective:
    """The objective of a stage; its calls are collective."""
    exchange: Exchange = GatheredColumns if section.exchange == "gather" else RingColumns
    if ranks.world_size == 1:
        exchange = OwnColumns
    try:
        tiles = make_tiles(ranks.device, section.tile_size, section.kernel)
    except ValueError as error:
        raise UserError(f"loss.kernel: {error}; leave it at auto") from error
    return TrainingObjective(Objective(section.kind, exchange, tiles), section.cache_gradients)
