"""A loss over more pairs than fit into memory (GradCache, Gao et al. 2021, arXiv 2101.06983).

The features of all micro-batches come first, without gradient; the loss and its gradient by each feature follow; then
every micro-batch is encoded again, and its features' gradients go back through the towers.

G pairs of this rank in a step, D width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.clip import CLIPOutput
from model.loss import Objective, PairLoss, attach_gradients


class CachedLoss:
    """The loss over all micro-batches of a step, for each of them with the gradients of its own features.

    outputs: of the first pass; the second has to give the same features, so the same masks
    """

    def __init__(self, pairs: Objective, outputs: Sequence[CLIPOutput]) -> None:
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
        return attach_gradients(part, *output)
