"""Vision transformer on the patches that masking kept.

B images, L patches of an image, P values of a patch, K patches kept in the batch, D width,
N = K + B tokens: each image's class token followed by its patches
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model.config import VisionConfig
from model.masking import PatchSelection
from model.packing import PackedLayout
from model.transformer import Transformer

# Per-channel statistics of OpenAI's CLIP training images, the convention of the field.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(images_BCHW: Tensor) -> Tensor:
    """uint8 RGB images -> float32 with about zero mean and unit variance, same shape."""
    mean_C = torch.tensor(PIXEL_MEAN, device=images_BCHW.device) * 255
    std_C = torch.tensor(PIXEL_STD, device=images_BCHW.device) * 255
    return (images_BCHW.float() - mean_C[:, None, None]) / std_C[:, None, None]


class VisionTransformer(nn.Module):
    """ViT whose feature is the class token; patches are gathered before they are embedded."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.num_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.mlp_ratio, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        self._init_parameters()

    def _init_parameters(self) -> None:
        width = self.transformer.width
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=width**-0.5)
        self.transformer.init_parameters()

    def forward(self, patches_BLP: Tensor, selection: PatchSelection) -> Tensor:
        """Features of the images, [B, L, P] -> [B, embed_dim], from the selected patches only."""
        B, L, _ = patches_BLP.shape
        kept_K = selection.kept_K
        image_K, patch_K = kept_K // L, kept_K % L
        patches_KP = patches_BLP.flatten(0, 1).index_select(0, kept_K)
        patches_KD = cast(Tensor, self.patch_embedding(patches_KP.to(self.proj.dtype)))
        patches_KD = patches_KD + self.positional_embedding[1:].index_select(0, patch_K)
        class_BD = (self.class_embedding + self.positional_embedding[0]).expand(B, -1)

        # image b's class token stands before its patches: b + 1 class tokens precede each of those
        before_B1 = torch.arange(B + 1, device=kept_K.device)
        cu_seqlens_B1 = (selection.cu_seqlens_B1 + before_B1).int()
        token_K = torch.arange(kept_K.numel(), device=kept_K.device) + image_K + 1
        index_N = torch.cat((cu_seqlens_B1[:-1], token_K))
        tokens_ND = torch.cat((class_BD, patches_KD))
        x_ND = torch.zeros_like(tokens_ND).index_copy(0, index_N, tokens_ND)

        layout = PackedLayout(cu_seqlens_B1)
        pooled_BD = self.transformer(self.ln_pre(x_ND), layout.first_token_B, layout)
        return cast(Tensor, self.ln_post(pooled_BD)) @ self.proj
