"""Torch's flash attention of variable length with a slow kernel for CPUs: the operator that is compiled on a GPU.

B sequences, q and k tokens of queries and keys in all, H heads, E width of a head, Q and K tokens of one sequence
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def _pieces(cu_seq_q: Tensor, cu_seq_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Each sequence's tokens among the queries and among the keys."""
    for q0, q1, k0, k1 in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        yield slice(int(q0), int(q1)), slice(int(k0), int(k1))


def _scores(query_QHE: Tensor, key_KHE: Tensor, is_causal: bool) -> Tensor:
    scores_HQK = torch.einsum("qhe,khe->hqk", query_QHE.double(), key_KHE.double()) * query_QHE.shape[-1] ** -0.5
    if is_causal:
        scores_HQK = scores_HQK.masked_fill(torch.ones(scores_HQK.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return scores_HQK


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    out_qHE, lse_Hq = torch.full_like(query, torch.nan), torch.zeros(query.shape[1], len(query))
    for q, k in _pieces(cu_seq_q, cu_seq_k):
        assert q.stop - q.start <= max_q, "a sequence is longer than is said"
        assert k.stop - k.start <= max_k, "a sequence is longer than is said"
        scores_HQK = _scores(query[q], key[k], is_causal)
        out_qHE[q] = torch.einsum("hqk,khe->qhe", scores_HQK.softmax(-1), value[k].double()).to(query.dtype)
        lse_Hq[:, q] = scores_HQK.logsumexp(-1).float()
    return out_qHE, lse_Hq, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.full_like(x, torch.nan) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    for q, k in _pieces(cu_seq_q, cu_seq_k):
        share_HQK = _scores(query[q], key[k], is_causal).softmax(-1)
        grad_QHE = grad_out[q].double()
        inner_HQ1 = (grad_QHE * out[q].double()).sum(-1).T.unsqueeze(-1)
        change_HQK = share_HQK * (torch.einsum("qhe,khe->hqk", grad_QHE, value[k].double()) - inner_HQ1) * scale
        grads[0][q] = torch.einsum("hqk,khe->qhe", change_HQK, key[k].double()).to(query.dtype)
        grads[1][k] = torch.einsum("hqk,qhe->khe", change_HQK, query[q].double()).to(query.dtype)
        grads[2][k] = torch.einsum("hqk,qhe->khe", share_HQK, grad_QHE).to(query.dtype)
    return grads


@cache
def use_flash_on_a_cpu() -> None:
    """From now on in this process. Tokens of no sequence become NaN, as they may on a GPU."""
    varlen._varlen_attn.register_kernel("cpu", _forward)
    varlen._varlen_attn_backward.register_kernel("cpu", _backward)
