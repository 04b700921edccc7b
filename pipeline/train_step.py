"""One training step: a batch becomes masked images and packed captions, features, a loss, and an update.

B pairs of this rank, L patches of an image, P values of a patch
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor

from model.clip import CLIPOutput
from model.loss import contrastive_loss
from model.masking import MaskingConfig, PatchSelection, choose_patches, patchify
from model.vision import normalize_pixels
from pipeline.data_loader import Batch
from pipeline.feature_gather import gather_features
from pipeline.ranks import Ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# What a step reports, all on the device: nothing here makes the host wait.
REPORT_NAMES = ("loss", "logit_scale", "mask_ratio", "mask_ratio_std", "image_tokens", "text_tokens")


def seed_masks(generator: Generator, seed: int, step: int, accumulation: int, rank: int) -> None:
    """Make the masks of a micro-batch a pure function of its place, so that a resumed run draws the same ones."""
    state = np.random.SeedSequence((seed, step, accumulation, rank)).generate_state(1, np.uint64)
    generator.manual_seed(int(state[0] >> np.uint64(1)))


def global_contrastive_loss(output: CLIPOutput, ranks: Ranks) -> Tensor:
    """This rank's rows of the loss over all ranks' pairs; its mean over ranks is the loss of the whole batch."""
    return contrastive_loss(
        output.image_features,
        output.text_features,
        output.logit_scale,
        gather_features(output.image_features),
        gather_features(output.text_features),
        first_row=ranks.rank * output.image_features.shape[0],
    )


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Iterable[Batch],
    masking: MaskingConfig,
    patch_size: int,
    generator: Generator,
    ranks: Ranks,
    seed: int,
    step: int,
) -> Tensor:
    """Accumulate the micro-batches' gradients and update the weights; means over micro-batches of REPORT_NAMES."""
    reports = []
    for accumulation, batch in enumerate(micro_batches):
        batch = batch.to(ranks.device)
        patches_BLP = patchify(normalize_pixels(batch.images_BCHW), patch_size)
        seed_masks(generator, seed, step, accumulation, ranks.rank)
        selection = choose_patches(patches_BLP, masking, generator)

        output: CLIPOutput = engine(patches_BLP, selection, batch.text)
        loss = global_contrastive_loss(output, ranks)
        engine.backward(loss)  # divides by the number of micro-batches
        engine.step()  # updates at the last of them

        reports.append(_report(loss, output, selection, patches_BLP, batch))
    return torch.stack(reports).mean(dim=0)


@torch.no_grad()
def _report(loss: Tensor, output: CLIPOutput, selection: PatchSelection, patches_BLP: Tensor, batch: Batch) -> Tensor:
    B, L, _ = patches_BLP.shape
    masked_share_B = 1 - selection.cu_seqlens_B1.diff() / L
    image_tokens, text_tokens = selection.kept_K.numel() + B, batch.tokens_N.numel()
    return torch.stack(
        [
            loss.detach(),
            output.logit_scale.detach().squeeze(0),
            masked_share_B.mean(),
            masked_share_B.std(correction=0),
            torch.full_like(loss, image_tokens),
            torch.full_like(loss, text_tokens),
        ]
    )
