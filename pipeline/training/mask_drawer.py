"""Drawing the masks of a training step: each a pure function of its place in the run.

B images, L patches of an image, T = L + 1 tokens, D width of patch embeddings, P values of a patch
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Generator, Tensor

from model.class_attention import AttentiveCopy
from model.masking import Guidance, MaskingConfig, Masks, PatchedImages, choose_patches
from model.towers import VisionTransformer, embed_patches
from pipeline.ranks import Ranks
from pipeline.recipe import Precision
from pipeline.training.engines.engine import gathered_weights

_EMBEDDING = ("patch_embedding.weight", "positional_embedding")


class MaskDrawer:
    """Chooses the patches of every micro-batch of a rank.

    A mask depends on (seed, step, micro-batch, rank) and on the weights where the strategy looks at them, so that a
    resumed run draws the same ones, and so does a second pass over the same batch.

    precision: of the model, and so of the products of the copy that `attentive` looks through
    """

    name = "attentive_copy"

    def __init__(
        self,
        config: MaskingConfig,
        visual: VisionTransformer,
        patch_size: int,
        seed: int,
        ranks: Ranks,
        precision: Precision = "fp32",
    ) -> None:
        self.config = config
        self.patch_size = patch_size
        self.copy: AttentiveCopy | None = None
        if config.strategy == "attentive":
            with gathered_weights(visual) as weights:
                self.copy = AttentiveCopy(visual, weights)
        self._visual = visual
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
        self._seed = seed
        self._rank = ranks.rank
        self._generator = Generator(device=ranks.device)

    def draw(self, images_BCHW: Tensor, step: int, micro_batch: int, progress: float) -> tuple[PatchedImages, Masks]:
        """Masks for uint8 images of one micro-batch, `progress` (0 to 1) through training."""
        seed_masks(self._generator, self._seed, step, micro_batch, self._rank)
        images = PatchedImages(images_BCHW, self.patch_size)
        guidance = Guidance(
            progress=progress,
            embed=self._embed() if self.config.embedding_mix else None,
            class_attention=functools.partial(self.copy.scores, dtype=self._dtype) if self.copy else None,
        )
        return images, choose_patches(images, self.config, self._generator, guidance)

    def update_copy(self) -> None:
        """After an update of the weights: move the copy that `attentive` looks through towards them."""
        if self.copy:
            with gathered_weights(self._visual) as weights:
                self.copy.update(weights, self.config.ema_decay)

    def state(self) -> dict[str, Tensor]:
        """What masks depend on beside the model and their place in the run: the copy's weights, if there is one."""
        return self.copy.visual.state_dict() if self.copy else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        if self.copy:
            self.copy.visual.load_state_dict(state)

    def _embed(self) -> Callable[[Tensor], Tensor]:
        with gathered_weights(self._visual, _EMBEDDING) as weights:  # in every step: no more than is needed
            weight_DP, position_TD = (weights[name].detach().clone() for name in _EMBEDDING)
        position_LD = position_TD[1:]
        return lambda patches_BLP: embed_patches(patches_BLP, weight_DP, position_LD)


def seed_masks(generator: Generator, seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Put the generator where the masks of this micro-batch begin."""
    state = np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(1, np.uint64)
    generator.manual_seed(int(state[0] >> np.uint64(1)))
