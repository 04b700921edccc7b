"""The loss of a step: of pairs on all ranks, of each micro-batch or of all of them at once.

With `cache_gradients` it is over more pairs than fit into memory (GradCache, Gao et al. 2021, arXiv 2101.06983): the
features of all micro-batches come first, without gradient; the loss and its gradient by each feature follow; then every
micro-batch is encoded again, and its features' gradients go back through the towers.

G pairs of this rank in a step, D width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import UserError
from model.clip import CLIPOutput
from model.loss import ContrastiveLoss, Exchange, OwnColumns, PairLoss, attach_gradients, make_tiles
from pipeline.ranks import Ranks
from pipeline.recipe import LossSection
from pipeline.training.feature_exchange import GatheredColumns, RingColumns


@dataclass(frozen=True)
class StepLoss:
    """A loss of pairs, taken of each micro-batch or, with `cache_gradients`, of all those of a step at once."""

    pairs: ContrastiveLoss
    cache_gradients: bool

    def begin(self, encode: Callable[[int], CLIPOutput], num_micro_batches: int) -> Callable[[int, CLIPOutput], Tensor]:
        """The loss of micro-batch n, given what `encode(n)` returns; its mean over micro-batches is the step's.

        encode: called here too, without gradient, for every micro-batch of `cache_gradients`: it must repeat itself
        """
        if not self.cache_gradients or num_micro_batches == 1:
            return lambda _, output: self.pairs(*output.for_pairs)
        with torch.no_grad():
            outputs = [encode(number) for number in range(num_micro_batches)]
        return _CachedLoss(self.pairs, outputs)


class _CachedLoss:
    """The loss over all micro-batches of a step, for each of them with the gradients of its own features.

    outputs: of the first pass; the second has to give the same features, so the same masks
    """

    def __init__(self, pairs: ContrastiveLoss, outputs: Sequence[CLIPOutput]) -> None:
        images_GD = torch.cat([output.image_features for output in outputs])
        texts_GD = torch.cat([output.text_features for output in outputs])
        whole = pairs.evaluate(images_GD, texts_GD, outputs[0].logit_scale, outputs[0].logit_bias)
        self._loss = whole.loss
        self._features, self._scalars = whole.gradients[:2], whole.gradients[2:]
        self._num_micro_batches = len(outputs)

    def __call__(self, number: int, output: CLIPOutput) -> Tensor:
        """The loss, with the gradients of micro-batch `number` such that their mean over micro-batches is the whole."""
        images, texts = (
            gradients.chunk(self._num_micro_batches)[number] * self._num_micro_batches for gradients in self._features
        )
        # scale and bias have their whole gradient in each micro-batch, and so in the mean
        part = PairLoss(self._loss, (images, texts, *(gradient.clone() for gradient in self._scalars)))
        return attach_gradients(part, *output.for_pairs)


def make_step_loss(section: LossSection, ranks: Ranks) -> StepLoss:
    """The loss of a stage's steps; its calls are collective."""
    exchange: Exchange = GatheredColumns if section.exchange == "gather" else RingColumns
    if ranks.world_size == 1:
        exchange = OwnColumns
    try:
        tiles = make_tiles(ranks.device, section.tile_size, section.kernel)
    except ValueError as error:
        raise UserError(f"loss.kernel: {error}; leave it at auto") from error
    return StepLoss(ContrastiveLoss(section.kind, exchange, tiles), section.cache_gradients)
