"""On a GPU all ways to compute attention are one function, of a single layer and of whole towers, forward and backward.

B sequences, N tokens in all, H heads, E width of a head
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from model.attention import Backend, packed_attention
from model.clip import CLIP
from model.config import Pool, config_from_name
from model.masking import MaskingConfig, PatchedImages, choose_patches
from model.packing import PackedLayout, lengths_to_cu_seqlens, pack_tokens

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
# what there is on each, beside the buckets that they are compared with
BACKENDS: dict[str, list[Backend]] = {"cpu": ["buckets"], "cuda": ["varlen", "flex", "buckets", "auto"]}
DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = [[99] * 8, [2, 30, 17, 1, 16, 77], [197, 60, 138, 1]]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float(((ours.double() - exact).norm() / exact.norm()).detach())


def values_and_gradient(
    qkv_N3HE: Tensor, layout: PackedLayout, causal: bool, pooled: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    qkv_N3HE = qkv_N3HE.detach().requires_grad_()
    if pooled:
        out = packed_attention(qkv_N3HE[:, 1:], layout, False, qkv_N3HE[layout.last_token_B, 0], backend)
    else:
        out = packed_attention(qkv_N3HE, layout, causal, backend=backend)
    direction = torch.randn(out.shape, generator=Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad((out * direction).sum(), qkv_N3HE)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", ["plain", "causal", "one query"])
def test_backends_equal_float64_buckets(device: str, dtype: torch.dtype, lengths: list[int], kind: str) -> None:
    """Each is as close to float64 as 16-bit inputs allow. `lengths` differ a lot, or not at all."""
    layout = PackedLayout(lengths_to_cu_seqlens(torch.tensor(lengths)).to(device), 256)
    qkv = torch.randn(sum(lengths), 3, 4, 32, generator=Generator().manual_seed(0)).to(device, dtype)
    case = (layout, kind == "causal", kind == "one query")
    exact, exact_grad = values_and_gradient(qkv.double(), *case, "buckets")
    bound = 0.01 if dtype == torch.bfloat16 else 0.002
    for backend in BACKENDS[device]:
        out, grad = values_and_gradient(qkv, *case, backend)
        assert out.dtype == grad.dtype == dtype, backend
        assert relative_error(out, exact) < bound, backend
        assert relative_error(grad, exact_grad) < 2 * bound, backend


def make_clip(device: str, pool: Pool) -> CLIP:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    text = dataclasses.replace(config.text, vocab_size=50, eot_token_id=49, context_length=20)
    vision = dataclasses.replace(config.vision, pool=pool)
    return CLIP(dataclasses.replace(config, vision=vision, text=text)).to(device)


def towers(clip: CLIP, device: str, dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    """Features of masked images and captions of many lengths, and all gradients."""
    clip.use_backend(backend)
    generator = Generator().manual_seed(2)
    images = PatchedImages(torch.randn(9, 3, 32, 32, generator=generator), 8)
    selection = choose_patches(images, MaskingConfig(), generator).selection
    patches = images.gather(selection.kept_K).to(device)
    selection = type(selection)(*(part.to(device) for part in selection))
    lengths = torch.randint(2, 20, (9,), generator=generator)
    tokens = torch.randint(1, 49, (int(lengths.sum()),), generator=generator)
    text = pack_tokens(tokens.to(device), lengths_to_cu_seqlens(lengths).to(device), 20)
    with torch.autocast(device, dtype=dtype):
        output = clip(patches, selection, text)
    parameters = [parameter for name, parameter in clip.named_parameters() if name != "logit_scale"]
    gradients = torch.autograd.grad((output.image_features @ output.text_features.T).diag().sum(), parameters)
    return [output.image_features, output.text_features, torch.cat([gradient.flatten() for gradient in gradients])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", get_args(Pool))
def test_whole_towers_are_the_same_with_every_backend(device: str, dtype: torch.dtype, pool: Pool) -> None:
    clip = make_clip(device, pool)
    expected = towers(clip, "cpu" if device == "cpu" else device, dtype, "buckets")
    for backend in BACKENDS[device]:
        features = towers(clip, device, dtype, backend)
        for ours, theirs in zip(features[:2], expected[:2], strict=True):
            assert F.cosine_similarity(ours, theirs).min() > 0.999, backend
        assert F.cosine_similarity(features[2], expected[2], dim=0) > 0.999, backend
