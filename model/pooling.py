"""From the tokens of an image to one vector, where it is not the class token: their mean, or SigLIP's attention head.

B images, N tokens in all, each image's class token followed by its patches, D width, H heads, E width of a head
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from model.attention import SelfAttention
from model.config import Activation
from model.packing import PackedLayout
from model.transformer import make_mlp


def mean_of_patches(x_ND: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over each image's patches without its class token, summed in fp32: [N, D] -> [B, D].

    The same bits in every call: a segment sum, where scattered additions would come in any order on CUDA.
    """
    # unsafe: the lengths are not checked, which would make the host wait
    sum_BD = torch.segment_reduce(x_ND.float(), "sum", lengths=layout.lengths_B, unsafe=True)
    sum_BD = sum_BD - x_ND[layout.first_token_B].float()
    return (sum_BD / (layout.lengths_B - 1)[:, None]).to(x_ND.dtype)


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
