"""Multi-head attention over packed sequences: a token attends within its own sequence only.

B sequences, N tokens in all, H heads, E width of a head, D = H * E, S = 3 (query, key, value) or 2 (key, value)
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention_backends import (
    Backend,
    bucketed_attention,
    choose_backend,
    flex_attention_packed,
    varlen_attention,
)
from model.packing import PackedLayout

_FUNCTIONS = {"varlen": varlen_attention, "flex": flex_attention_packed, "buckets": bucketed_attention}


def packed_attention(
    tokens_NSHE: Tensor,
    layout: PackedLayout,
    causal: bool,
    query_BHE: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of every token to its own sequence: query, key and value [N, 3, H, E] -> [N, H, E].

    With one query per sequence, `query_BHE`, `tokens_NSHE` is key and value [N, 2, H, E], and the result [B, H, E].
    """
    if layout.attention_bias_BHTT is not None:
        backend = "buckets"
    elif backend == "auto":
        backend = choose_backend(tokens_NSHE.device, tokens_NSHE.dtype)
    return _FUNCTIONS[backend](tokens_NSHE, query_BHE, layout, causal)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention` (in_proj_*, out_proj)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.backend: Backend = "auto"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x_ND: Tensor) -> Tensor:
        """Query, key and value of every token, [N, D] -> [N, 3, H, E]."""
        qkv_N3HE: Tensor = F.linear(x_ND, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        return qkv_N3HE

    def project_pooled(self, x_ND: Tensor, pooled_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of the pooled vectors alone, [B, H, E], and key and value of every token, [N, 2, H, E]."""
        width = x_ND.shape[-1]
        query_weight, kv_weight = self.in_proj_weight.split((width, 2 * width))
        query_bias, kv_bias = self.in_proj_bias.split((width, 2 * width))
        query_BHE = F.linear(pooled_BD, query_weight, query_bias).unflatten(-1, (self.heads, -1))
        return query_BHE, F.linear(x_ND, kv_weight, kv_bias).unflatten(-1, (2, self.heads, -1))

    def attend(self, qkv_N3HE: Tensor, layout: PackedLayout) -> Tensor:
        """What every token gathers from its sequence, before the output projection: [N, 3, H, E] -> [N, D]."""
        return packed_attention(qkv_N3HE, layout, self.causal, backend=self.backend).flatten(1)

    def attend_pooled(self, query_BHE: Tensor, kv_N2HE: Tensor, layout: PackedLayout) -> Tensor:
        """The same for one query per sequence, [B, D]; under a causal mask that of the last token, which sees all."""
        return packed_attention(kv_N2HE, layout, False, query_BHE, backend=self.backend).flatten(1)

    def output(self, x_ND: Tensor) -> Tensor:
        """The output projection, [N, D] -> [N, D]."""
        return cast(Tensor, self.out_proj(x_ND))
