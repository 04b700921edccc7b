"""Pre-norm transformer on packed tokens; parameter names are open_clip's.

B sequences, N tokens in all, D width, H heads, E width of a head
"""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import SelfAttention
from model.config import Activation
from model.packing import PackedLayout


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's models."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """Any shape."""
        # as SiLU, which is one kernel and keeps one tensor for the backward pass
        return F.silu(1.702 * x_ND) / 1.702


def make_mlp(width: int, mlp_ratio: float, activation: Activation) -> nn.Sequential:
    """Two linear layers around an activation, [N, D] -> [N, D]."""
    hidden = int(width * mlp_ratio)
    layers = [
        ("c_fc", nn.Linear(width, hidden)),
        ("gelu", QuickGELU() if activation == "quick_gelu" else nn.GELU()),
        ("c_proj", nn.Linear(hidden, width)),
    ]
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): what precedes and what follows the attention proper.

    Uncompiled, in 16 bits and with flash attention, a block launches 10 kernels forward, 19 backward.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, causal: bool, activation: Activation) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = make_mlp(width, mlp_ratio, activation)

    def before_attention(self, x_ND: Tensor) -> Tensor:
        """Queries, keys and values of all tokens, [N, D] -> [N, 3, H, E]."""
        return self.attn.project(self.ln_1(x_ND))

    def after_attention(self, x_ND: Tensor, attended_ND: Tensor) -> Tensor:
        """The rest of the block, [N, D] -> [N, D]."""
        x_ND = x_ND + self.attn.output(attended_ND)
        return x_ND + cast(Tensor, self.mlp(self.ln_2(x_ND)))

    def forward(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        """Every token: [N, D] -> [N, D]."""
        return self.after_attention(x_ND, self.attn.attend(self.before_attention(x_ND), layout))

    def forward_pooled(self, x_ND: Tensor, pooled_B: Tensor, layout: PackedLayout) -> Tensor:
        """One token per sequence, [N, D] -> [B, D]: equal to `forward(...)[pooled_B]` at a fraction of its cost.

        Under a causal mask the pooled token must be the last one, which sees its whole sequence.
        """
        normed_ND = self.ln_1(x_ND)
        query_BHE, kv_N2HE = self.attn.project_pooled(normed_ND, normed_ND[pooled_B])
        attended_BD = self.attn.attend_pooled(query_BHE, kv_N2HE, layout)
        return self.after_attention(x_ND[pooled_B], attended_BD)


class Transformer(nn.Module):
    """A stack of blocks. `checkpoint_blocks`: recompute each block in the backward pass instead of storing it."""

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, causal: bool, activation: Activation
    ) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.checkpoint_blocks = False
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, causal, activation) for _ in range(layers))

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return [cast(Block, block) for block in self.resblocks]

    def forward(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        """Every token: [N, D] -> [N, D]."""
        return self._through(self.blocks, x_ND, layout)

    def forward_pooled(self, x_ND: Tensor, pooled_B: Tensor, layout: PackedLayout) -> Tensor:
        """[N, D] -> [B, D] at the pooled tokens; the last block computes nothing for the others."""
        *blocks, last = self.blocks
        return last.forward_pooled(self._through(blocks, x_ND, layout), pooled_B, layout)

    def _through(self, blocks: list[Block], x_ND: Tensor, layout: PackedLayout) -> Tensor:
        for block in blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_ND = checkpoint(block, x_ND, layout, use_reentrant=False)
            else:
                x_ND = block(x_ND, layout)
        return x_ND

    def compile_blocks(self, dynamic: bool) -> None:
        """Compile the blocks; `dynamic` where the number of tokens differs between steps, as in text.

        Whole where attention is one operator to the compiler, else what surrounds it. One compilation serves all
        blocks, since they differ in their weights alone.
        """
        is_whole = self.blocks[0].attn.backend == "varlen"
        for part in ("forward", "forward_pooled") if is_whole else ("before_attention", "after_attention"):
            compiled = torch.compile(getattr(Block, part), dynamic=dynamic)
            for block in self.blocks:
                # a bound method, which a copy of the block binds to itself
                setattr(block, part, MethodType(compiled, block))

    @torch.no_grad()
    def init_parameters(self) -> None:
        """CLIP's initialisation: residual projections shrink with depth (Radford et al. 2021, section 2.4)."""
        attention_std = self.width**-0.5
        projection_std = attention_std * (2 * len(self.resblocks)) ** -0.5
        hidden_std = (2 * self.width) ** -0.5
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=attention_std)
            nn.init.normal_(block.attn.out_proj.weight, std=projection_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(cast(nn.Linear, block.mlp.c_fc).weight, std=hidden_std)
            nn.init.normal_(cast(nn.Linear, block.mlp.c_proj).weight, std=projection_std)
