"""Features of masked images: an evaluation under the conditions of training, on request only.

b images of one call, L patches of an image, K patches kept of all, D embed_dim, S size of the square image
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from formats.errors import UserError
from model.clip import CLIP
from model.masking import Guidance, MaskingConfig, PatchedImages, PatchSelection, choose_patches
from model.packing import lengths_to_cu_seqlens
from model.towers import embed_patches

# They depend on a second model, or on the other images of the batch.
_NOT_ALONE = ("attentive", "cluster-reference")


def check_maskable(masking: MaskingConfig) -> None:
    """Raise UserError for strategies that cannot mask one image by itself."""
    if masking.strategy in _NOT_ALONE:
        raise UserError(f"--mask-images: {masking.strategy} masks cannot be drawn for one image alone")


def encode_masked(clip: CLIP, images_BCHW: Tensor, masking: MaskingConfig) -> Tensor:
    """Unit-length features [b, D] of uint8 images [b, 3, S, S], each masked by itself at the end-of-training ratio.

    An image's mask depends on its pixels alone, so that figures do not depend on batches and ranks.
    """
    selections = [_select(clip, image_CHW, masking) for image_CHW in images_BCHW]
    L = clip.visual.num_patches
    kept_K = torch.cat([selection.kept_K + L * index for index, selection in enumerate(selections)])
    counts_B = torch.tensor([selection.kept_K.numel() for selection in selections], device=kept_K.device)
    patches_KP = PatchedImages(images_BCHW, clip.config.vision.patch_size).gather(kept_K)
    features_BD = clip.visual(patches_KP, PatchSelection(kept_K, lengths_to_cu_seqlens(counts_B)))
    return F.normalize(features_BD, dim=-1)


def _select(clip: CLIP, image_CHW: Tensor, masking: MaskingConfig) -> PatchSelection:
    seed = zlib.crc32(image_CHW.cpu().contiguous().numpy().tobytes())
    generator = Generator(device=image_CHW.device).manual_seed(seed)
    visual = clip.visual
    weight_DP, position_LD = visual.patch_embedding.weight, visual.positional_embedding[1:]
    guidance = Guidance(progress=1.0, embed=lambda patches_BLP: embed_patches(patches_BLP, weight_DP, position_LD))
    images = PatchedImages(image_CHW[None], clip.config.vision.patch_size)
    return choose_patches(images, masking, generator, guidance).selection
