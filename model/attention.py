"""Multi-head attention over packed sequences: a token attends within its own sequence only.

B sequences, N tokens in all, H heads, E width of a head, D = H * E, S = 3 (query, key, value) or 2 (key, value)
n, T, Q: sequences of a bucket, its padded length, and queries of each sequence (T or 1)

Three backends compute the same function of the same arguments: `tokens_NSHE` stacks query, key and value of every
token, or key and value alone (S = 2) where there is one query per sequence, in order, `query_BHE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen

from model.packing import PackedLayout

Backend = Literal["auto", "varlen", "flex", "buckets"]
BACKENDS: tuple[Backend, ...] = ("auto", "varlen", "flex", "buckets")


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """What `auto` means: variable-length flash attention where it runs, else buckets of similar length.

    Flash attention needs an NVIDIA GPU of compute capability 8.0 and 16-bit floats.
    """
    is_16_bit = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and is_16_bit and torch.cuda.get_device_capability(device) >= (8, 0):
        return "varlen"
    return "buckets"


def varlen_attention(tokens_NSHE: Tensor, query_BHE: Tensor | None, layout: PackedLayout, causal: bool) -> Tensor:
    """torch's variable-length flash attention: no padding, and the host never learns the lengths."""
    query, key, value = _split(tokens_NSHE, query_BHE)
    per_token = query_BHE is None
    out_NHE = varlen.varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens_B1 if per_token else layout.one_each_B1,
        layout.cu_seqlens_B1,
        layout.max_length if per_token else 1,
        layout.max_length,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    assert isinstance(out_NHE, Tensor)
    return out_NHE


def flex_attention_packed(tokens_NSHE: Tensor, query_BHE: Tensor | None, layout: PackedLayout, causal: bool) -> Tensor:
    """FlexAttention with a mask that keeps sequences apart; compiled on CUDA, without gradients on a CPU."""
    create_block_mask, flex_attention = _flex_functions(tokens_NSHE.device.type)
    query, key, value = _split(tokens_NSHE, query_BHE)
    key_sequence_N = layout.sequence_N(key.shape[0])
    query_sequence = key_sequence_N if query_BHE is None else torch.arange(query.shape[0], device=query.device)

    def is_visible(_batch: Tensor, _head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        same = query_sequence[query_index] == key_sequence_N[key_index]
        return same & (key_index <= query_index) if causal else same

    mask = create_block_mask(is_visible, None, None, query.shape[0], key.shape[0], device=str(query.device))
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out_1HNE: Tensor = flex_attention(query, key, value, block_mask=mask)
    return out_1HNE.squeeze(0).transpose(0, 1)


@cache
def _flex_functions(device_type: str) -> tuple[Any, Any]:
    """What makes the mask and what applies it: compiled on CUDA, where neither may write N x N to memory."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device_type != "cuda":
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask, dynamic=True), torch.compile(flex_attention, dynamic=True)


def bucketed_attention(tokens_NSHE: Tensor, query_BHE: Tensor | None, layout: PackedLayout, causal: bool) -> Tensor:
    """Dense kernels on buckets of sequences of similar length; only attention pays for the padding.

    Under a causal mask no real token sees the padding, which comes last; otherwise the padding is masked out.
    """
    if layout.uniform_length is not None:
        tokens_BTSHE = tokens_NSHE.unflatten(0, (layout.num_sequences, layout.uniform_length))
        if query_BHE is None:
            return _dense(tokens_BTSHE, None, layout.attention_bias_BHTT, causal)
        # the bias is images' alone, where the one query is the first token's
        bias_BH1T = None if layout.attention_bias_BHTT is None else layout.attention_bias_BHTT[:, :, :1]
        return _dense(tokens_BTSHE, query_BHE.unsqueeze(1), bias_BH1T, causal)
    buckets = layout.buckets
    # split, not slices: the gradient of a slice is as large as what it was cut from
    cells = tokens_NSHE.index_select(0, buckets.token_index_M).split([n * T for n, T, _ in buckets.shapes])
    queries: Sequence[Tensor | None] = [None] * len(cells)
    if query_BHE is not None:
        queries_B1HE = query_BHE.index_select(0, buckets.sequence_index_B).unsqueeze(1)
        queries = queries_B1HE.split([n for n, _, _ in buckets.shapes])
    outputs = []
    for (n, T, valid_nT), cells_mSHE, query_n1HE in zip(buckets.shapes, cells, queries, strict=True):
        mask = None if causal or valid_nT is None else valid_nT[:, None, None, :]
        outputs.append(_dense(cells_mSHE.unflatten(0, (n, T)), query_n1HE, mask, causal))
    return torch.cat(outputs).index_select(0, buckets.cell_N if query_BHE is None else buckets.sequence_position_B)


def _split(tokens_NSHE: Tensor, query_BHE: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if query_BHE is None:
        query, key, value = tokens_NSHE.unbind(-3)
    else:
        query, (key, value) = query_BHE, tokens_NSHE.unbind(-3)
    return query, key, value


def _dense(tokens_nTSHE: Tensor, query_n1HE: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
    """[n, T, S, H, E] -> [n * Q, H, E]."""
    query, key, value = _split(tokens_nTSHE, query_n1HE)
    return dense_attention(query, key, value, mask, causal).flatten(0, 1)


def dense_attention(
    query_nQHE: Tensor, key_nTHE: Tensor, value_nTHE: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention within a rectangle, [n, Q, H, E]; `mask` broadcasts to [n, H, Q, T]: bool (True is seen) or a bias."""
    query, key, value = (x.transpose(1, 2) for x in (query_nQHE, key_nTHE, value_nTHE))
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        out = _attention_by_products(query, key, value, mask, causal)
    else:
        mask = mask.to(query.dtype) if mask is not None and mask.dtype != torch.bool else mask
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


def _attention_by_products(
    query_nHQE: Tensor, key_nHTE: Tensor, value_nHTE: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Two matrix products and a softmax: in bf16 on a CPU three times as fast as torch's fused kernel at 99 tokens."""
    with torch.autocast(query_nHQE.device.type, enabled=False):
        scores_nHQT = (query_nHQE * query_nHQE.shape[-1] ** -0.5) @ key_nHTE.mT
        if causal:
            hidden_QT = torch.ones(scores_nHQT.shape[-2:], dtype=torch.bool, device=scores_nHQT.device).triu(1)
            scores_nHQT = scores_nHQT.masked_fill(hidden_QT, -torch.inf)
        elif mask is not None and mask.dtype == torch.bool:
            scores_nHQT = scores_nHQT.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores_nHQT = scores_nHQT + mask.to(scores_nHQT.dtype)
        out_nHQE: Tensor = scores_nHQT.softmax(dim=-1) @ value_nHTE
    return out_nHQE


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
