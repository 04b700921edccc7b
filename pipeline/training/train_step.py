"""One training step: a batch becomes masked images and packed captions, features, a loss, and an update.

B pairs of this rank, L patches of an image
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.clip import CLIPOutput
from model.loss import contrastive_loss
from model.masking import Masks
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.feature_gather import gather_features
from pipeline.training.mask_drawer import MaskDrawer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# What a step reports, all on the device: nothing here makes the host wait.
REPORT_NAMES = (
    "loss",
    "logit_scale",
    "mask_ratio",
    "mask_ratio_std",
    "mask_threshold",
    "flat_patches",
    "image_tokens",
    "text_tokens",
)
# NaN where a masking strategy does not have them.
OPTIONAL_NAMES = ("mask_threshold", "flat_patches")


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
    masks: MaskDrawer,
    ranks: Ranks,
    step: int,
    progress: float,
) -> Tensor:
    """Accumulate the micro-batches' gradients and update the weights; means over micro-batches of REPORT_NAMES.

    progress: through training, from 0 at the first step to 1 at the last
    """
    reports = []
    for number, batch in enumerate(micro_batches):
        batch = batch.to(ranks.device)
        images, chosen = masks.draw(batch.images_BCHW, step, number, progress)
        patches_KP = images.gather(chosen.selection.kept_K)

        output: CLIPOutput = engine(patches_KP, chosen.selection, batch.text, chosen.visible_BT)
        loss = global_contrastive_loss(output, ranks)
        engine.backward(loss)  # divides by the number of micro-batches
        engine.step()  # updates at the last of them

        reports.append(_report(loss, output, chosen, images.num_patches, batch))
    masks.follow()
    return torch.stack(reports).mean(dim=0)


@torch.no_grad()
def _report(loss: Tensor, output: CLIPOutput, chosen: Masks, num_patches: int, batch: Batch) -> Tensor:
    kept_B = chosen.selection.cu_seqlens_B1.diff()
    masked_share_B = 1 - kept_B / num_patches
    image_tokens = chosen.selection.kept_K.numel() + kept_B.numel()
    return torch.stack(
        [
            loss.detach(),
            output.logit_scale.detach().squeeze(0),
            masked_share_B.mean(),
            masked_share_B.std(correction=0),
            chosen.threshold,
            chosen.flat_share,
            torch.full_like(loss, image_tokens),
            torch.full_like(loss, batch.tokens_N.numel()),
        ]
    )
