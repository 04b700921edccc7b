"""Vision transformer on the patches that masking kept.

B images, L patches of an image, P values of a patch, K patches kept in the batch, D width,
N = K + B tokens: each image's class token followed by its patches; T tokens of an image where all have as many
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import VisionConfig
from model.masking.reference import reference_bias
from model.masking.selection import PatchSelection
from model.packing import PackedLayout
from model.pooling import AttentionPool, mean_of_patches
from model.transformer import Transformer


def embed_patches(patches_BLP: Tensor, weight_DP: Tensor, position_LD: Tensor) -> Tensor:
    """Patch embeddings with their positions, [B, L, P] -> [B, L, D], from given weights (masking.embedding_mix)."""
    return F.linear(patches_BLP.to(weight_DP.dtype), weight_DP) + position_LD


class VisionTransformer(nn.Module):
    """ViT on patches that are gathered before they are embedded; `VisionConfig.pool` says where its feature is read."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = embed_dim
        width = config.width
        self.pool = config.pool
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.num_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, causal=False, activation=config.activation
        )
        self.ln_post = nn.LayerNorm(width)
        if config.pool == "attention":
            self.attn_pool = AttentionPool(width, config.heads, config.mlp_ratio, config.activation)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        self._init_parameters()

    def _init_parameters(self) -> None:
        width = self.transformer.width
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=width**-0.5)
        self.transformer.init_parameters()

    @property
    def num_patches(self) -> int:
        """L, patches of a whole image."""
        return self.config.num_patches

    def forward(self, patches_KP: Tensor, selection: PatchSelection, visible_BT: Tensor | None = None) -> Tensor:
        """Features of the images, [K, P] -> [B, embed_dim], from the selected patches only.

        visible_BT: tokens whose pairs get a bonus in attention (`cluster-reference` alone).
        """
        x_ND, layout = self.tokens(patches_KP, selection, visible_BT)
        return self._pooled(self.ln_pre(x_ND), layout) @ self.proj

    def _pooled(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        """Through the blocks and the last norm to one vector per image, [N, D] -> [B, D]."""
        if self.pool == "class":
            return cast(Tensor, self.ln_post(self.transformer.forward_pooled(x_ND, layout.first_token_B, layout)))
        x_ND = self.ln_post(self.transformer(x_ND, layout))
        return mean_of_patches(x_ND, layout) if self.pool == "average" else self.attn_pool(x_ND, layout)

    def tokens(
        self, patches_KP: Tensor, selection: PatchSelection, visible_BT: Tensor | None = None
    ) -> tuple[Tensor, PackedLayout]:
        """Embedded patches, each image's behind its class token: x_ND and where images begin and end."""
        B, L = selection.cu_seqlens_B1.numel() - 1, self.num_patches
        image_K, patch_K = selection.kept_K // L, selection.kept_K % L
        patches_KD = cast(Tensor, self.patch_embedding(patches_KP.to(self.proj.dtype)))
        patches_KD = patches_KD + self.positional_embedding[1:].index_select(0, patch_K)
        class_BD = (self.class_embedding + self.positional_embedding[0]).expand(B, -1)

        # image b's class token stands before its patches: b + 1 class tokens precede each of those
        before_B1 = torch.arange(B + 1, device=image_K.device)
        cu_seqlens_B1 = (selection.cu_seqlens_B1 + before_B1).int()
        token_K = torch.arange(image_K.numel(), device=image_K.device) + image_K + 1
        index_N = torch.cat((cu_seqlens_B1[:-1], token_K))
        tokens_ND = torch.cat((class_BD, patches_KD))
        x_ND = torch.zeros_like(tokens_ND).index_copy(0, index_N, tokens_ND)
        bias_BHTT = None if visible_BT is None else reference_bias(visible_BT, self.transformer.heads)
        return x_ND, PackedLayout(cu_seqlens_B1, max_length=L + 1, attention_bias_BHTT=bias_BHTT)
