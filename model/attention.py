"""Multi-head attention over packed sequences: a token attends within its own sequence only.

B sequences, N tokens in all, H heads, E width of a head, D = H * E
n, T: sequences of a bucket and its padded length; M: cells of all buckets (model/packing.py)
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.packing import PackedLayout


def _dense_attention(
    query_nTHE: Tensor, key_nTHE: Tensor, value_nTHE: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    mask_n11T = None if mask is None else mask[:, None, None, :]
    query, key, value = (x.transpose(1, 2) for x in (query_nTHE, key_nTHE, value_nTHE))
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        out = _attention_by_products(query, key, value, mask_n11T, causal)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_n11T, is_causal=causal)
    return out.transpose(1, 2)


def _attention_by_products(
    query_nHTE: Tensor, key_nHTE: Tensor, value_nHTE: Tensor, mask_n11T: Tensor | None, causal: bool
) -> Tensor:
    """Two matrix products and a softmax: in bf16 on a CPU three times as fast as torch's fused kernel at 99 tokens."""
    with torch.autocast(query_nHTE.device.type, enabled=False):
        scores_nHTT = (query_nHTE * query_nHTE.shape[-1] ** -0.5) @ key_nHTE.mT
        if causal:
            hidden_TT = torch.ones(scores_nHTT.shape[-2:], dtype=torch.bool, device=scores_nHTT.device).triu(1)
            scores_nHTT = scores_nHTT.masked_fill(hidden_TT, -torch.inf)
        elif mask_n11T is not None:
            scores_nHTT = scores_nHTT.masked_fill(~mask_n11T, -torch.inf)
        out_nHTE: Tensor = scores_nHTT.softmax(dim=-1) @ value_nHTE
    return out_nHTE


def packed_attention(qkv_N3HE: Tensor, layout: PackedLayout, causal: bool) -> Tensor:
    """Attention of every token to its own sequence, [N, 3, H, E] -> [N, H, E].

    Dense kernels on buckets of sequences of similar length. Under a causal mask no real token sees the padding,
    which comes last; otherwise the padding is masked out.
    """
    if layout.uniform_length is not None:
        query, key, value = qkv_N3HE.unflatten(0, (layout.num_sequences, -1)).unbind(2)
        return _dense_attention(query, key, value, None, causal).flatten(0, 1)
    buckets = layout.buckets
    qkv_M3HE = qkv_N3HE.index_select(0, buckets.token_index_M)
    outputs, cell = [], 0
    for n, padded_length, valid_nT in buckets.shapes:
        qkv_nT3HE = qkv_M3HE[cell : cell + n * padded_length].unflatten(0, (n, padded_length))
        query, key, value = qkv_nT3HE.unbind(2)
        outputs.append(_dense_attention(query, key, value, None if causal else valid_nT, causal).flatten(0, 1))
        cell += n * padded_length
    return torch.cat(outputs).index_select(0, buckets.cell_N)


def pooled_attention(query_BHE: Tensor, kv_N2HE: Tensor, layout: PackedLayout) -> Tensor:
    """Attention of one query per sequence to all tokens of that sequence, [B, H, E] -> [B, H, E]."""
    if layout.uniform_length is not None:
        key, value = kv_N2HE.unflatten(0, (layout.num_sequences, -1)).unbind(2)
        return _dense_attention(query_BHE.unsqueeze(1), key, value, None, causal=False).squeeze(1)
    buckets = layout.buckets
    kv_M2HE = kv_N2HE.index_select(0, buckets.token_index_M)
    query_B1HE = query_BHE.index_select(0, buckets.sequence_index_B).unsqueeze(1)
    outputs, cell, sequence = [], 0, 0
    for n, padded_length, valid_nT in buckets.shapes:
        kv_nT2HE = kv_M2HE[cell : cell + n * padded_length].unflatten(0, (n, padded_length))
        key, value = kv_nT2HE.unbind(2)
        outputs.append(_dense_attention(query_B1HE[sequence : sequence + n], key, value, valid_nT, causal=False))
        cell += n * padded_length
        sequence += n
    return torch.cat(outputs).squeeze(1).index_select(0, buckets.sequence_position_B)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention` (in_proj_*, out_proj)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def _project(self, x_ND: Tensor, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of (query, key, value) as [N, last - first, H, E]."""
        width = x_ND.shape[-1]
        rows = slice(first * width, last * width)
        projected = F.linear(x_ND, self.in_proj_weight[rows], self.in_proj_bias[rows])
        heads_N3HE: Tensor = projected.unflatten(-1, (last - first, self.heads, -1))
        return heads_N3HE

    def forward(self, x_ND: Tensor, layout: PackedLayout) -> Tensor:
        """Every token's output: [N, D] -> [N, D]."""
        out_NHE = packed_attention(self._project(x_ND, 0, 3), layout, self.causal)
        return cast(Tensor, self.out_proj(out_NHE.flatten(1)))

    def forward_pooled(self, x_ND: Tensor, pooled_B: Tensor, layout: PackedLayout) -> Tensor:
        """The output at one token of each sequence, [N, D] -> [B, D].

        For causal attention the pooled token must be the last one, which sees its whole sequence.
        """
        query_BHE = self._project(x_ND[pooled_B], 0, 1).squeeze(1)
        out_BHE = pooled_attention(query_BHE, self._project(x_ND, 1, 3), layout)
        return cast(Tensor, self.out_proj(out_BHE.flatten(1)))
