"""One training step: a batch becomes masked images and packed captions, features, a loss, and an update.

B pairs of this rank, L patches of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.clip import CLIPOutput
from model.masking import Masks, PatchedImages
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.faults.step_guard import spread_non_finite
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.objectives.objective import TrainingObjective
from pipeline.training.observing.phase_clock import PhaseClock

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


class Encoded(NamedTuple):
    """A micro-batch on the device, the patches chosen of its images, and the features of both towers."""

    batch: Batch
    images: PatchedImages
    masks: Masks
    output: CLIPOutput


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Sequence[Batch],
    masks: MaskDrawer,
    objective: TrainingObjective,
    ranks: Ranks,
    step: int,
    progress: float,
    clock: PhaseClock | None = None,
) -> Tensor:
    """Accumulate the micro-batches' gradients and update the weights; means over micro-batches of REPORT_NAMES.

    progress: through training, from 0 at the first step to 1 at the last
    clock: told where the phases of the step end, if somebody wants to know
    """
    clock = clock or PhaseClock(ranks.device)

    def encode(number: int) -> Encoded:
        batch = micro_batches[number].to(ranks.device)
        images, chosen = masks.draw(batch.images_BCHW, step, number, progress)
        patches_KP = images.gather(chosen.selection.kept_K)
        clock.end("masks")
        output = engine(patches_KP, chosen.selection, batch.text, chosen.visible_BT)
        clock.end("forward")
        return Encoded(batch, images, chosen, output)

    reports = []
    loss_of = objective.for_step(lambda number: encode(number).output, len(micro_batches))
    for number in range(len(micro_batches)):
        encoded = encode(number)
        loss = loss_of(number, encoded.output)
        clock.end("loss")
        engine.backward(spread_non_finite(loss))  # divides by the number of micro-batches
        clock.end("backward")
        engine.step()  # updates at the last of them
        clock.end("update")
        reports.append(_report(loss, encoded))
    masks.follow()
    return torch.stack(reports).mean(dim=0)


@torch.no_grad()
def _report(loss: Tensor, encoded: Encoded) -> Tensor:
    batch, images, chosen, output = encoded
    kept_B = chosen.selection.cu_seqlens_B1.diff()
    masked_share_B = 1 - kept_B / images.num_patches
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
