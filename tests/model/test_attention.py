"""The two ways to compute attention on a CPU are the same function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.attention import _attention_by_products, packed_attention
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 30, 17, 1, 16]])
def test_bfloat16_stays_close_to_float32_and_in_bfloat16(causal: bool, lengths: list[int]) -> None:
    layout = PackedLayout(lengths_to_cu_seqlens(torch.tensor(lengths)), granularity=16)
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=torch.Generator().manual_seed(0))
    exact = packed_attention(qkv, layout, causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = packed_attention(qkv.bfloat16(), layout, causal)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05
