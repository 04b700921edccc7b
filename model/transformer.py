"""Pre-norm transformer on packed tokens; parameter names are open_clip's.

B sequences, N tokens in all, D width
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from model.attention import SelfAttention
from model.packing import PackedLayout


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, causal: bool) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, hidden)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(hidden, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        """Every token: [N, D] -> [N, D]."""
        x_ND = x_ND + self.attn(self.ln_1(x_ND), layout)
        return x_ND + cast(Tensor, self.mlp(self.ln_2(x_ND)))

    def forward_pooled(self, x_ND: Tensor, pooled_B: Tensor, layout: PackedLayout) -> Tensor:
        """One token per sequence, [N, D] -> [B, D]: equal to `forward(...)[pooled_B]` at a fraction of its cost."""
        x_BD = x_ND[pooled_B] + self.attn.forward_pooled(self.ln_1(x_ND), pooled_B, layout)
        return x_BD + cast(Tensor, self.mlp(self.ln_2(x_BD)))


class Transformer(nn.Module):
    """A stack of blocks of which only one token per sequence is read."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float, causal: bool) -> None:
        super().__init__()
        self.width = width
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, causal) for _ in range(layers))

    def forward(self, x_ND: Tensor, pooled_B: Tensor, layout: PackedLayout) -> Tensor:
        """[N, D] -> [B, D] at the pooled tokens; the last block computes nothing for the others."""
        *blocks, last = (cast(Block, block) for block in self.resblocks)
        for block in blocks:
            x_ND = block(x_ND, layout)
        return last.forward_pooled(x_ND, pooled_B, layout)

    @torch.no_grad()
    def init_parameters(self) -> None:
        """CLIP's initialisation: residual projections shrink with depth (Radford et al. 2021, section 2.4)."""
        attention_std = self.width**-0.5
        projection_std = attention_std * (2 * len(self.resblocks)) ** -0.5
        hidden_std = (2 * self.width) ** -0.5
        for block in (cast(Block, block) for block in self.resblocks):
            nn.init.normal_(block.attn.in_proj_weight, std=attention_std)
            nn.init.normal_(block.attn.out_proj.weight, std=projection_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(cast(nn.Linear, block.mlp.c_fc).weight, std=hidden_std)
            nn.init.normal_(cast(nn.Linear, block.mlp.c_proj).weight, std=projection_std)
