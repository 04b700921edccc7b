"""All ways to compute packed attention are the same function."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from model.attention import Backend, _attention_by_products, choose_backend, packed_attention
from model.packing import PackedLayout, lengths_to_cu_seqlens

LENGTHS = [[5, 5, 5], [2, 30, 17, 1, 16], [7], [1, 1, 1], [20, 40, 2]]
SIGNATURE = inspect.signature(varlen.varlen_attn)


def stand_in_for_varlen(*args: object, **kwargs: object) -> Tensor:
    """What torch documents of `varlen_attn`, by loops, for arguments that its kernel accepts."""
    given = SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    given = given.arguments
    query, key, value = given["query"], given["key"], given["value"]
    assert query.ndim == key.ndim == 3
    assert key.shape == value.shape
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert given["window_size"] in ((-1, -1), (-1, 0))
    outputs = []
    for cu_seqlens, tokens, longest in (("cu_seq_q", query, "max_q"), ("cu_seq_k", key, "max_k")):
        assert given[cu_seqlens].dtype == torch.int32
        assert given[cu_seqlens][0] == 0
        assert given[cu_seqlens][-1] == len(tokens)
        assert given[cu_seqlens].diff().max() <= given[longest]
    for b in range(len(given["cu_seq_q"]) - 1):
        q, k, v = (
            x[given[name][b] : given[name][b + 1]].transpose(0, 1)
            for x, name in ((query, "cu_seq_q"), (key, "cu_seq_k"), (value, "cu_seq_k"))
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if given["window_size"] == (-1, 0):
            assert q.shape == k.shape
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def varlen_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in_for_varlen)


@pytest.mark.parametrize("kind", ["plain", "causal", "masked", "biased"])
def test_products_equal_the_fused_kernel(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 9, 8, generator=generator).requires_grad_().unbind(0)
    mask = None
    if kind == "masked":
        mask = (torch.arange(9) < torch.tensor([[9], [3], [1], [7]]))[:, None, None, :]
    elif kind == "biased":
        mask = torch.randn(4, 2, 9, 9, generator=generator)
    ours = _attention_by_products(query, key, value, mask, causal=kind == "causal")
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=kind == "causal")
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


def assert_same_gradients(ours: Tensor, exact: Tensor, inputs: Tensor) -> None:
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (a,) = torch.autograd.grad((ours * direction).sum(), inputs, retain_graph=True)
    (b,) = torch.autograd.grad((exact * direction).sum(), inputs, retain_graph=True)
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("backend", ["buckets", "flex", "varlen"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_backends_equal_attention_of_each_sequence_alone(backend: Backend, causal: bool, lengths: list[int]) -> None:
    layout = PackedLayout(lengths_to_cu_seqlens(torch.tensor(lengths)), 64)
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=torch.Generator().manual_seed(0))
    qkv.requires_grad_(backend != "flex")  # which has no gradients on a CPU
    exact = attention_one_by_one(qkv, lengths, causal)
    ours = packed_attention(qkv, layout, causal, backend=backend)
    assert torch.allclose(ours, exact.float(), atol=1e-5)

    # one query per sequence: the last token's, which sees everything with and without a causal mask
    last_B = torch.tensor(lengths).cumsum(0) - 1
    pooled = packed_attention(qkv[:, 1:], layout, False, qkv[last_B, 0], backend)
    assert torch.allclose(pooled, exact.float()[last_B], atol=1e-5)
    if backend != "flex":
        assert_same_gradients(ours, exact, qkv)
        assert_same_gradients(pooled, exact[last_B], qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_reaches_every_token_and_the_single_query(dtype: torch.dtype) -> None:
    """Sequences of one length with a bias on the logits; the single query is the first token's."""
    generator = torch.Generator().manual_seed(0)
    qkv, bias = torch.randn(4 * 6, 3, 2, 8, generator=generator), torch.randn(4, 2, 6, 6, generator=generator)
    layout = PackedLayout(lengths_to_cu_seqlens(torch.full((4,), 6)), 6, attention_bias_BHTT=bias)
    query, key, value = (x.transpose(1, 2) for x in qkv.unflatten(0, (4, 6)).double().unbind(2))
    weights = (query @ key.mT / 8**0.5 + bias).softmax(-1)
    exact = (weights @ value).transpose(1, 2).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    ours = packed_attention(qkv.to(dtype), layout, False, backend="flex")  # a bias overrules the choice
    assert torch.allclose(ours.float(), exact.flatten(0, 1), atol=tolerance)
    pooled = packed_attention(qkv[:, 1:].to(dtype), layout, False, qkv[::6, 0].to(dtype))
    assert torch.allclose(pooled.float(), exact[:, 0], atol=tolerance)


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


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "backend"),
    [
        ("cpu", torch.bfloat16, None, "buckets"),
        ("cuda", torch.bfloat16, (9, 0), "varlen"),
        ("cuda", torch.float16, (8, 0), "varlen"),
        ("cuda", torch.float32, (9, 0), "buckets"),
        ("cuda", torch.float16, (7, 5), "buckets"),
    ],
)
def test_automatic_choice(
    device: str, dtype: torch.dtype, capability: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_backend(torch.device(device), dtype) == backend
