"""The packed towers against a plain padded implementation, written independently with explicit softmax attention.

B sequences, T padded tokens, D width, H heads, L patches
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from model.class_attention import AttentiveCopy
from model.clip import CLIP
from model.config import Activation, CLIPConfig, Pool, config_from_name
from model.masking import (
    STRATEGIES,
    Guidance,
    MaskingConfig,
    PatchedImages,
    PatchSelection,
    choose_patches,
    keep_all,
    patchify,
)
from model.packing import PackedLayout, PackedTokens, lengths_to_cu_seqlens, normalize_pixels

Weights = dict[str, Tensor]


# Attention and pooling of text towers.
TEXT = {"causal": ("causal", "last"), "bidirectional": ("bidirectional", "last"), "mean": ("bidirectional", "mean")}


def small_config(pool: Pool = "class", activation: Activation = "gelu", layers: int = 3) -> CLIPConfig:
    config = config_from_name("ViT-test-8")
    text = dataclasses.replace(config.text, vocab_size=50, eot_token_id=49, context_length=20, layers=layers)
    vision = dataclasses.replace(config.vision, layers=layers, pool=pool)
    return dataclasses.replace(config, vision=vision, text=text).with_activation(activation)


def make_clip(pool: Pool = "class", activation: Activation = "gelu", text: str = "causal") -> CLIP:
    torch.manual_seed(0)
    config = small_config(pool, activation)
    attention, text_pool = TEXT[text]
    clip = CLIP(dataclasses.replace(config, text=dataclasses.replace(config.text, attention=attention, pool=text_pool)))
    with torch.no_grad():  # biases and norms away from their neutral values, so that a forgotten one shows
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return clip


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w[f"{name}.weight"], w[f"{name}.bias"])


def padded_mlp(x: Tensor, w: Weights, p: str, activation: str) -> Tensor:
    hidden = x @ w[f"{p}.c_fc.weight"].T + w[f"{p}.c_fc.bias"]
    active = hidden / (1 + torch.exp(-1.702 * hidden)) if activation == "quick_gelu" else F.gelu(hidden)
    return active @ w[f"{p}.c_proj.weight"].T + w[f"{p}.c_proj.bias"]


def padded_transformer(
    x_BTD: Tensor, w: Weights, prefix: str, layers: int, heads: int, activation: str, blocked_BTT: Tensor
) -> Tensor:
    """Dense blocks; blocked[b, i, j] hides token j from token i."""
    B, T, D = x_BTD.shape
    for layer in range(layers):
        p = f"{prefix}.resblocks.{layer}"
        qkv = norm(x_BTD, w, f"{p}.ln_1") @ w[f"{p}.attn.in_proj_weight"].T + w[f"{p}.attn.in_proj_bias"]
        q, k, v = (part.view(B, T, heads, D // heads).transpose(1, 2) for part in qkv.split(D, dim=-1))
        scores = q @ k.transpose(2, 3) / (D // heads) ** 0.5
        attention = scores.masked_fill(blocked_BTT[:, None], float("-inf")).softmax(-1)
        out = (attention @ v).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + out @ w[f"{p}.attn.out_proj.weight"].T + w[f"{p}.attn.out_proj.bias"]
        x_BTD = x_BTD + padded_mlp(norm(x_BTD, w, f"{p}.ln_2"), w, f"{p}.mlp", activation)
    return x_BTD


def padded_pool(x_BTD: Tensor, w: Weights, config: CLIPConfig, kept_BL: Tensor) -> Tensor:
    """One vector per image from normed tokens, class token first, one image at a time."""
    vision, pooled = config.vision, []
    if vision.pool == "class":
        return x_BTD[:, 0]
    for x_TD, kept_L in zip(x_BTD, kept_BL, strict=True):
        seen_kD = x_TD[1:][kept_L]
        if vision.pool == "average":
            pooled.append(seen_kD.mean(0))
            continue
        p, seen_TD = "visual.attn_pool", torch.cat((x_TD[:1], seen_kD))
        out_1D, _ = F.multi_head_attention_forward(
            query=w[f"{p}.probe"][None],
            key=seen_TD,
            value=seen_TD,
            embed_dim_to_check=vision.width,
            num_heads=vision.heads,
            in_proj_weight=w[f"{p}.attn.in_proj_weight"],
            in_proj_bias=w[f"{p}.attn.in_proj_bias"],
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=w[f"{p}.attn.out_proj.weight"],
            out_proj_bias=w[f"{p}.attn.out_proj.bias"],
        )
        pooled.append((out_1D + padded_mlp(norm(out_1D, w, f"{p}.ln"), w, f"{p}.mlp", config.activation))[0])
    return torch.stack(pooled)


def padded_image_features(w: Weights, images: Tensor, kept_BL: Tensor, config: CLIPConfig) -> Tensor:
    """All patches go through; the dropped ones are hidden from everybody as keys."""
    v = config.vision
    kernel = w["visual.patch_embedding.weight"].view(v.width, 3, v.patch_size, v.patch_size)
    patches = F.conv2d(images, kernel, stride=v.patch_size).flatten(2).transpose(1, 2)
    B, L, _ = patches.shape
    x = torch.cat((w["visual.class_embedding"].expand(B, 1, -1), patches), 1) + w["visual.positional_embedding"]
    blocked = ~torch.cat((torch.ones(B, 1, dtype=torch.bool), kept_BL), 1)[:, None, :].expand(B, L + 1, L + 1)
    x = norm(x, w, "visual.ln_pre")
    x = padded_transformer(x, w, "visual.transformer", v.layers, v.heads, config.activation, blocked)
    return padded_pool(norm(x, w, "visual.ln_post"), w, config, kept_BL) @ w["visual.proj"]


def padded_text_features(w: Weights, tokens_BT: Tensor, config: CLIPConfig) -> Tensor:
    B, T = tokens_BT.shape
    x = w["text.token_embedding.weight"][tokens_BT] + w["text.positional_embedding"][:T]
    end_B = (tokens_BT == config.text.eot_token_id).int().argmax(1)
    is_padding_BT = torch.arange(T) > end_B[:, None]
    blocked = torch.ones(T, T, dtype=torch.bool).triu(1).expand(B, T, T)
    if config.text.attention == "bidirectional":
        blocked = is_padding_BT[:, None, :].expand(B, T, T)
    x = padded_transformer(x, w, "text.transformer", config.text.layers, config.text.heads, config.activation, blocked)
    x = norm(x, w, "text.ln_final")
    pooled_BD = x[torch.arange(B), end_B]
    if config.text.pool == "mean":
        seen_BT = ~is_padding_BT
        pooled_BD = torch.stack([x_TD[seen_T].mean(0) for x_TD, seen_T in zip(x, seen_BT, strict=True)])
    return pooled_BD @ w["text.text_projection"]


def captions_BT(lengths: list[int], seed: int = 0) -> Tensor:
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(1, 49, (length - 1,), generator=Generator().manual_seed(seed + row))
        tokens[row, length - 1] = 49
    return tokens


def assert_same_gradients(clip: CLIP, packed: Tensor, padded: Tensor, weights: Weights, prefix: str) -> None:
    """Compare values and all parameter gradients of a random projection of the features, to 1e-5."""
    assert torch.allclose(packed, padded, atol=1e-5, rtol=1e-5)
    direction = torch.randn(packed.shape, generator=Generator().manual_seed(9))
    (packed * direction).sum().backward()
    (padded * direction).sum().backward()
    compared = 0
    for name, parameter in clip.named_parameters():
        if name.startswith(prefix):
            reference = weights[name].grad
            assert parameter.grad is not None, name
            assert reference is not None, name
            scale = max(1.0, float(reference.abs().max()))
            assert (parameter.grad - reference).abs().max() <= 1e-5 * scale, name
            compared += 1
    assert compared > 30


def leaf_weights(clip: CLIP) -> Weights:
    return {name: value.detach().clone().requires_grad_() for name, value in clip.named_parameters()}


@pytest.mark.parametrize("pool", get_args(Pool))
@pytest.mark.parametrize("strategy", ["none", "random", "cluster", "uneven"])
def test_image_tower_equals_padded(strategy: str, pool: Pool) -> None:
    assert_image_tower_equals_padded(make_clip(pool), strategy)


def assert_image_tower_equals_padded(clip: CLIP, strategy: str) -> None:
    images = torch.randn(5, 3, 32, 32, generator=Generator().manual_seed(1))
    if strategy == "uneven":  # lengths far apart, so that buckets are padded; one image keeps a single patch
        kept = torch.tensor([0, *range(16, 32), 35, 37, 40, 48, 49, 50, *range(70, 80)])
        counts = torch.stack([((kept >= 16 * b) & (kept < 16 * b + 16)).sum() for b in range(5)])
        selection = PatchSelection(kept, lengths_to_cu_seqlens(counts))
    else:
        selection = choose_patches(
            PatchedImages(images, 8), MaskingConfig(strategy=strategy), Generator().manual_seed(2)
        ).selection
    kept_BL = torch.zeros(5 * 16, dtype=torch.bool).index_fill(0, selection.kept_K, True).view(5, 16)
    weights = leaf_weights(clip)
    padded = padded_image_features(weights, images, kept_BL, clip.config)
    features = clip.visual(PatchedImages(images, 8).gather(selection.kept_K), selection)
    assert_same_gradients(clip, features, padded, weights, "visual.")


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 20, 9, 13, 3, 4, 8], [7]])
def test_text_tower_equals_padded(lengths: list[int], text: str) -> None:
    assert_text_tower_equals_padded(make_clip(text=text), lengths)


@pytest.mark.parametrize("text", TEXT)
def test_text_features_are_the_same_through_flex_attention(text: str) -> None:
    clip, tokens = make_clip(text=text), captions_BT([2, 20, 9, 13])
    with torch.no_grad():  # without gradients on a CPU
        expected = clip.encode_text(tokens)
        clip.use_backend("flex")
        assert torch.allclose(clip.encode_text(tokens), expected, atol=1e-6)
        alone = [clip.encode_text(row[None, :length]) for row, length in zip(tokens, (2, 20, 9, 13), strict=True)]
    assert torch.allclose(torch.cat(alone), expected, atol=1e-6)


@pytest.mark.parametrize("pool", ["class", "attention"])
def test_quick_gelu_in_every_mlp(pool: Pool) -> None:
    assert_image_tower_equals_padded(make_clip(pool, "quick_gelu"), "uneven")
    assert_text_tower_equals_padded(make_clip(pool, "quick_gelu"), [2, 20, 9])


def assert_text_tower_equals_padded(clip: CLIP, lengths: list[int]) -> None:
    tokens = captions_BT(lengths)
    weights = leaf_weights(clip)
    padded = padded_text_features(weights, tokens, clip.config)
    assert_same_gradients(clip, clip.encode_text(tokens, normalize=False), padded, weights, "text.")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropped_patches_get_no_gradient_and_have_no_influence(strategy: str) -> None:
    clip, images = make_clip(), torch.randn(4, 3, 32, 32, generator=Generator().manual_seed(1)).requires_grad_()
    masks = choose_patches(
        PatchedImages(images.detach(), 8),
        MaskingConfig(strategy),
        Generator().manual_seed(0),
        Guidance(class_attention=AttentiveCopy(clip.visual, dict(clip.visual.named_parameters())).scores),
    )
    kept_K = masks.selection.kept_K

    def features(images: Tensor) -> Tensor:
        return clip.visual(PatchedImages(images, 8).gather(kept_K), masks.selection, masks.visible_BT)

    before = features(images)
    before.square().sum().backward()
    assert images.grad is not None
    touched = patchify(images.grad, 8).flatten(0, 1).abs().amax(1) > 0
    assert touched.nonzero().squeeze(1).tolist() == kept_K.sort().values.tolist()
    with torch.no_grad():
        images[images.grad == 0] = torch.nan
    assert torch.equal(features(images), before)


def test_checkpointing_changes_neither_values_nor_gradients() -> None:
    """The blocks' second pass sees the masks of the first."""
    images, tokens = (
        PatchedImages(torch.randn(4, 3, 32, 32), 8),
        PackedTokens.from_padded(captions_BT([4, 6, 3, 9]), 49),
    )
    selection = choose_patches(images, MaskingConfig(), Generator().manual_seed(0)).selection
    results = []
    for checkpointing in (False, True):
        clip = make_clip()
        if checkpointing:
            clip.checkpoint_blocks()
        calls: list[Tensor] = []
        clip.visual.transformer.blocks[0].ln_2.register_forward_hook(lambda *_, calls=calls: calls.append(_))
        output = clip(images.gather(selection.kept_K), selection, tokens)
        (output.image_features @ output.text_features.T).diag().sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients = [p.grad for p in clip.parameters() if p.grad is not None]
        results.append([output.image_features, output.text_features, *gradients])
    assert len(results[0]) > 60
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("granularity", [1, 4, 16, 64])
def test_buckets_hold_every_token_once(granularity: int) -> None:
    lengths = torch.tensor([3, 17, 1, 16, 40, 17, 2])
    layout = PackedLayout(lengths_to_cu_seqlens(lengths), 40, granularity)
    buckets = layout.buckets
    assert sum(bucket.num_sequences for bucket in buckets.shapes) == 7
    assert sorted(buckets.sequence_index_B.tolist()) == list(range(7))
    assert torch.equal(buckets.sequence_index_B[buckets.sequence_position_B], torch.arange(7))
    assert buckets.cell_N.unique().numel() == int(lengths.sum())
    assert torch.equal(buckets.token_index_M[buckets.cell_N], torch.arange(int(lengths.sum())))


def test_padded_api_reads_up_to_the_first_end_token() -> None:
    clip, tokens = make_clip(), captions_BT([6, 9])
    longer = F.pad(tokens, (0, 5), value=3)
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(longer))
    assert torch.allclose(clip.encode_text(tokens).norm(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="end-of-text"):
        PackedTokens.from_padded(torch.tensor([[1, 2, 49], [1, 2, 3]]), 49)
    with pytest.raises(ValueError, match="takes captions of 20 tokens, not 21"):
        clip.encode_text(captions_BT([21]))


def test_encode_image_keeps_every_patch_and_checks_the_size() -> None:
    clip, images = make_clip(), torch.randn(3, 3, 32, 32)
    expected = clip.visual(patchify(images, 8).flatten(0, 1), keep_all(3, 16, images.device))
    assert torch.equal(clip.encode_image(images, normalize=False), expected)
    photos = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(clip.encode_image(photos), clip.encode_image(normalize_pixels(photos)))
    for height, width in ((64, 64), (16, 64), (30, 30)):  # the second has as many patches
        with pytest.raises(ValueError, match=f"32 x 32, not .{height}, {width}"):
            clip.encode_image(torch.randn(1, 3, height, width))


@pytest.mark.parametrize("raw", [-1.0, 2.0, 4.6, 4.7])
def test_logit_scale_is_bounded_and_can_come_back(raw: float) -> None:
    clip, images, tokens = make_clip(), torch.randn(2, 3, 32, 32), captions_BT([4, 6])
    clip.logit_scale.data.fill_(raw)
    patches = patchify(images, 8).flatten(0, 1)
    scale = clip(patches, keep_all(2, 16, images.device), PackedTokens.from_padded(tokens, 49)).logit_scale
    assert scale.item() == pytest.approx(min(torch.tensor(raw).exp().item(), 100.0), rel=1e-5)
    (upwards,) = torch.autograd.grad(-scale.sum(), clip.logit_scale, retain_graph=True)
    (downwards,) = torch.autograd.grad(scale.sum(), clip.logit_scale)
    assert downwards.item() == pytest.approx(scale.item(), rel=1e-5)
    assert upwards.item() == pytest.approx(0.0 if raw > 4.606 else -scale.item(), rel=1e-5)


def test_bfloat16_is_close_to_float32() -> None:
    clip, images = make_clip(), PatchedImages(torch.randn(4, 3, 32, 32), 8)
    selection = choose_patches(images, MaskingConfig(), Generator().manual_seed(0)).selection
    patches = images.gather(selection.kept_K)
    exact = F.normalize(clip.visual(patches, selection), dim=-1)
    rounded = F.normalize(clip.bfloat16().visual(patches, selection).float(), dim=-1)
    assert (exact * rounded).sum(1).min() > 0.998
