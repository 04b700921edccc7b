"""The two towers, image and text, on packed tokens: from patches and token ids to one feature each.

B images or captions, L patches of an image, G patches along its side, P values of a patch, K patches kept in the batch,
D width, H heads, E width of a head, N tokens in all (of images: each class token followed by its patches, N = K + B);
T tokens of an image where all have as many, or positions
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import SelfAttention
from model.config import Activation, TextConfig, VisionConfig
from model.masking.reference import reference_bias
from model.packing import PackedLayout, PackedTokens, PatchSelection
from model.transformer import Transformer, make_mlp


def mean_of_patches(x_ND: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over each image's patches without its class token, summed in fp32: [N, D] -> [B, D].

    The same bits in every call: a segment sum, where scattered additions would come in any order on CUDA.
    """
    sum_BD = _sum_of_tokens(x_ND, layout) - x_ND[layout.first_token_B].float()
    return (sum_BD / (layout.lengths_B - 1)[:, None]).to(x_ND.dtype)


def mean_of_tokens(x_ND: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over all tokens of each sequence, summed in fp32: [N, D] -> [B, D], the same bits in every call."""
    return (_sum_of_tokens(x_ND, layout) / layout.lengths_B[:, None]).to(x_ND.dtype)


def _sum_of_tokens(x_ND: Tensor, layout: PackedLayout) -> Tensor:
    # unsafe: the lengths are not checked, which would make the host wait
    return torch.segment_reduce(x_ND.float(), "sum", lengths=layout.lengths_B, unsafe=True)


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens of an image, then x + mlp(norm(x)).

    Source: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al. 2023), the MAP head of big_vision's ViT.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(width))
        self.attn = SelfAttention(width, heads, causal=False)
        self.ln = nn.LayerNorm(width)
        self.mlp = make_mlp(width, mlp_ratio, activation)
        self._init_parameters()

    @torch.no_grad()
    def _init_parameters(self) -> None:
        nn.init.normal_(self.probe, std=self.probe.numel() ** -0.5)
        nn.init.xavier_uniform_(self.attn.in_proj_weight)
        for layer in (self.attn.out_proj, self.mlp.c_fc, self.mlp.c_proj):
            linear = cast(nn.Linear, layer)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        """[N, D] -> [B, D]; one query per image."""
        if layout.attention_bias_BHTT is not None:  # which is for pairs of an image's own tokens
            layout = replace(layout, attention_bias_BHTT=None)
        query_BHE, kv_N2HE = self.attn.project_pooled(x_ND, self.probe.expand(layout.num_sequences, -1))
        x_BD = self.attn.output(self.attn.attend_pooled(query_BHE, kv_N2HE, layout))
        return x_BD + cast(Tensor, self.mlp(self.ln(x_BD)))


def embed_patches(patches_BLP: Tensor, weight_DP: Tensor, position_LD: Tensor) -> Tensor:
    """Patch embeddings with their positions, [B, L, P] -> [B, L, D], from given weights (masking.embedding_mix)."""
    return F.linear(patches_BLP.to(weight_DP.dtype), weight_DP) + position_LD


class VisionTransformer(nn.Module):
    """ViT on patches that are gathered before they are embedded; `VisionConfig.pool` says where its feature is read."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_patches = config.num_patches  # L, of a whole image
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


class TextTransformer(nn.Module):
    """Text tower on true tokens alone, which see no padding; `TextConfig.pool` says where its feature is read."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.pool = config.pool
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(
            config.width,
            config.layers,
            config.heads,
            config.mlp_ratio,
            causal=config.attention == "causal",
            activation=config.activation,
        )
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._init_parameters()

    def _init_parameters(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.transformer.width**-0.5)
        self.transformer.init_parameters()

    def forward(self, text: PackedTokens, mask: nn.Module | None = None) -> Tensor:
        """Features of the captions, [N] tokens -> [B, embed_dim]. No caption may exceed the context length.

        mask: embeds captions with masked tokens, of which every token in its context is wanted: [N, D], normed
        """
        layout = text.layout
        if mask is not None:
            x_ND = self._with_positions(mask(text.tokens_N, self.token_embedding), layout)
            return cast(Tensor, self.ln_final(self.transformer(x_ND, layout)))
        x_ND = self._with_positions(cast(Tensor, self.token_embedding(text.tokens_N)), layout)
        return self._pooled(x_ND, layout) @ self.text_projection

    def _with_positions(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        num_tokens = len(x_ND)
        first_N = layout.first_token_B[layout.sequence_N(num_tokens)]
        position_N = torch.arange(num_tokens, device=first_N.device) - first_N
        return x_ND + self.positional_embedding.index_select(0, position_N)

    def _pooled(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        """Through the blocks and the last norm to one vector per caption, [N, D] -> [B, D]."""
        if self.pool == "last":
            return cast(Tensor, self.ln_final(self.transformer.forward_pooled(x_ND, layout.last_token_B, layout)))
        return mean_of_tokens(self.ln_final(self.transformer(x_ND, layout)), layout)


_IMAGE, _TEXT = "visual.positional_embedding", "text.positional_embedding"


def fit_positions(weights: Mapping[str, Tensor], num_patches: int, context_length: int) -> dict[str, Tensor]:
    """Weights of `model.clip.CLIP` with positions for this many patches of an image and tokens of a caption.

    Captions have the first of the positions there are: their features stay the same. ValueError if there are fewer
    than `context_length`: what the others would have become cannot be known.
    """
    fitted = dict(weights)
    fitted[_IMAGE] = resize_grid(weights[_IMAGE], num_patches)
    available = weights[_TEXT].shape[0]
    if available < context_length:
        raise ValueError(f"captions have {available} positions, fewer than the {context_length} of the model")
    fitted[_TEXT] = weights[_TEXT][:context_length]
    return fitted


def resize_grid(positions_TD: Tensor, num_patches: int) -> Tensor:
    """Class token's and patches' positions for another square grid: bicubic, antialiased, [1 + L, D] -> [1 + L', D].

    ValueError if the patches are not a square. Source: open_clip's `resize_pos_embed`.
    """
    class_1D, patches_LD = positions_TD[:1], positions_TD[1:]
    old, new = math.isqrt(patches_LD.shape[0]), math.isqrt(num_patches)
    if old * old != patches_LD.shape[0]:
        raise ValueError(f"{patches_LD.shape[0]} positions of patches are not a square")
    if old == new:
        return positions_TD
    grid_1DGG = patches_LD.float().T.unflatten(1, (old, old)).unsqueeze(0)
    resized_1DGG = F.interpolate(grid_1DGG, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((class_1D, resized_1DGG.squeeze(0).flatten(1).T.to(class_1D.dtype)))
