"""Contrastive losses on features of unit length.

B pairs of this rank, G pairs in the global batch, D width of the features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_features_BD: Tensor,
    text_features_BD: Tensor,
    logit_scale: Tensor,
    all_image_features_GD: Tensor | None = None,
    all_text_features_GD: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3) of this rank's rows, in fp32: a scalar.

    With the gathered features of all ranks and the position `first_row` of this rank's rows in them, the mean of the
    result over ranks is the loss of the concatenated batch, and so is its gradient if the gather's backward sums.
    """
    image_BD, text_BD = image_features_BD.float(), text_features_BD.float()
    all_image_GD = image_BD if all_image_features_GD is None else all_image_features_GD.float()
    all_text_GD = text_BD if all_text_features_GD is None else all_text_features_GD.float()
    target_B = first_row + torch.arange(image_BD.shape[0], device=image_BD.device)
    with torch.autocast(image_BD.device.type, enabled=False):
        scale = logit_scale.float()
        image_loss = F.cross_entropy(scale * image_BD @ all_text_GD.T, target_B)
        text_loss = F.cross_entropy(scale * text_BD @ all_image_GD.T, target_B)
    return (image_loss + text_loss) / 2
