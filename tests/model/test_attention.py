"""All ways to compute packed attention are the same function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import packed_attention
from model.attention_backends import Backend, _attention_by_products
from model.packing import PackedLayout, lengths_to_cu_seqlens


@pytest.mark.parametrize("kind", ["plain", "causal", "masked"])
def test_products_equal_the_fused_kernel(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 9, 8, generator=generator).requires_grad_().unbind(0)
    mask = torch.arange(9) < torch.tensor([[9], [3], [1], [7]]) if kind == "masked" else None
    mask_n11T = None if mask is None else mask[:, None, None, :]
    ours = _attention_by_products(query, key, value, mask_n11T, causal=kind == "causal")
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_n11T, is_causal=kind == "causal")
    assert torch.allclose(ours, fused, atol=1e-6)
    direction = torch.randn(ours.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad((ours * direction).sum(), (query, key, value), retain_graph=True),
        torch.autograd.grad((fused * direction).sum(), (query, key, value)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def attention_one_by_one(qkv_N3HE: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Explicit softmax attention of each sequence alone, in float64."""
    outputs = []
    for sequence_T3HE in qkv_N3HE.double().split(lengths):
        query, key, value = (x.transpose(0, 1) for x in sequence_T3HE.unbind(1))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("backend", ["buckets", "flex"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 30, 17, 1, 16], [7]])
def test_backends_equal_attention_of_each_sequence_alone(backend: Backend, causal: bool, lengths: list[int]) -> None:
    layout = PackedLayout(lengths_to_cu_seqlens(torch.tensor(lengths)), 64)
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = attention_one_by_one(qkv, lengths, causal).float()
    assert torch.allclose(packed_attention(qkv, layout, causal, backend=backend), expected, atol=1e-5)

    # one query per sequence: the last token's, which sees everything with and without a causal mask
    pooled = packed_attention(qkv[:, 1:], layout, False, qkv[layout.last_token_B, 0], backend)
    assert torch.allclose(pooled, expected[layout.last_token_B], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 30, 17, 1, 16]])
def test_bfloat16_stays_close_to_float32_and_in_bfloat16(causal: bool, lengths: list[int]) -> None:
    layout = PackedLayout(lengths_to_cu_seqlens(torch.tensor(lengths)), 64, granularity=16)
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=torch.Generator().manual_seed(0))
    exact = packed_attention(qkv, layout, causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = packed_attention(qkv.bfloat16(), layout, causal)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05
