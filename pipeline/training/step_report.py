"""What a training step reports of itself, by objective.

B pairs or captions of this rank, R values of a report
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from model.clip import CLIPOutput

# Of pairs; the first is what was trained for, as in WORD_NAMES.
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
# Where concepts are predicted beside.
CONCEPT_NAMES = ("concept_loss", "concept_hits")
# Where masked words are predicted instead.
WORD_NAMES = ("mlm_loss", "mlm_hits", "mlm_tokens", "text_tokens")
# NaN where a masking strategy does not have them.
OPTIONAL_NAMES = ("mask_threshold", "flat_patches", *CONCEPT_NAMES, *WORD_NAMES[:2])


class Part(NamedTuple):
    """What a micro-batch came to.

    loss: to be differentiated; the mean over micro-batches and ranks is the step's
    means_R: figures by name, of which the same mean is logged
    finite_B: whether the features of each sample are finite
    output: features of pairs, where there are any
    """

    loss: Tensor
    means_R: Tensor
    finite_B: Tensor
    output: CLIPOutput | None = None


@dataclass(frozen=True)
class StepReport:
    """What became of a step, all on the device: nothing here makes the host wait.

    means_R: of the micro-batches, of REPORT_NAMES and perhaps CONCEPT_NAMES, or of WORD_NAMES, on this rank
    grad_norm: of all gradients on all ranks, before clipping
    skipped: 1 if the step changed nothing, else 0; the same on all ranks
    finite_B: of every sample of this rank, whether its features are finite
    """

    means_R: Tensor
    grad_norm: Tensor
    skipped: Tensor
    finite_B: Tensor
