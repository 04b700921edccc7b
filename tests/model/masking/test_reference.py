"""`cluster-reference` against the released code's behaviour, transcribed with torch's own attention.

B images, L patches, k kept of each, T = k + 1 tokens, H heads
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mask_pictures import choose, generator, photos_BCHW, pictures_BCHW
from torch import Tensor

from model.clip import CLIP
from model.config import config_from_name
from model.masking import MaskingConfig, PatchedImages, draw_anchors, patchify
from model.towers import VisionTransformer

Kept = tuple[Tensor, Tensor]


def released_selection(images_BCHW: Tensor, ratio: float, anchors_BA: Tensor, noise_BL: Tensor) -> Kept:
    """Kept patches [B, k] and the mask that was meant to hide some of them, [B, T, T], nonzero where hidden."""
    patches = patchify(images_BCHW, 8)
    patches = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    patches = patches / patches.norm(dim=2, keepdim=True)
    cosine = patches @ patches.transpose(1, 2)  # all pairs
    B, L, _ = cosine.shape
    masked = torch.zeros(B, L)
    for b in range(B):
        for anchor in anchors_BA[b].tolist():
            masked[b][cosine[b, anchor] > ratio] = 1  # the ratio serves as threshold
            masked[b, anchor] = 1
    most_visible = int((masked == 0).sum(1).max())
    k = min(int(L * (1 - 0.3)), most_visible)
    order = torch.argsort(noise_BL.exp() * masked, dim=1)[:, :k]
    hidden = torch.cat((torch.zeros(B, 1), masked.gather(1, order)), 1)
    return order, hidden[:, :, None] + hidden[:, None, :]


def released_tower(visual: VisionTransformer, images_BCHW: Tensor, kept: Tensor, attn_mask: Tensor) -> Tensor:
    B, heads = len(images_BCHW), visual.transformer.heads
    patches = patchify(images_BCHW, 8)
    x = torch.cat((visual.class_embedding.expand(B, 1, -1), visual.patch_embedding(patches)), 1)
    x = x + visual.positional_embedding
    x = torch.cat((x[:, :1], torch.stack([row[1 + index] for row, index in zip(x, kept, strict=True)])), 1)
    x = visual.ln_pre(x)
    mask = (attn_mask == 0).repeat(heads, 1, 1)
    for block in visual.transformer.blocks:
        attention = torch.nn.MultiheadAttention(x.shape[2], heads, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask.to(y.dtype))[0]
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, 0]) @ visual.proj


@pytest.mark.parametrize(("B", "ratio"), [(5, 0.5), (3, 0.3), (4, 0.7), (1, 0.5), (6, 0.9)])
def test_the_tower_equals_the_released_behaviour(B: int, ratio: float) -> None:
    torch.manual_seed(0)
    visual = CLIP(config_from_name("ViT-test-8")).visual
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, generate = pictures_BCHW(B, 32, seed=B), generator(3)
    anchors = draw_anchors(B, 16, 0.1, generate)
    kept, attn_mask = released_selection(images, ratio, anchors, torch.rand(B, 16, generator=generate))
    masks = choose(images, MaskingConfig("cluster-reference", ratio, anchor_ratio=0.1), seed=3)
    expected_K = (kept + 16 * torch.arange(B)[:, None]).flatten()
    assert torch.equal(masks.selection.kept_K, expected_K)
    assert masks.selection.cu_seqlens_B1.tolist() == [kept.shape[1] * b for b in range(B + 1)]
    assert masks.visible_BT is not None
    assert torch.equal(masks.visible_BT, attn_mask.diagonal(dim1=1, dim2=2) == 0)
    assert masks.threshold.item() == pytest.approx(ratio)

    features = visual(PatchedImages(images, 8).gather(masks.selection.kept_K), masks.selection, masks.visible_BT)
    expected = released_tower(visual, images, kept, attn_mask)
    assert torch.allclose(features, expected, atol=1e-5)
    unbiased = visual(PatchedImages(images, 8).gather(masks.selection.kept_K), masks.selection)
    assert masks.visible_BT.all() or not torch.allclose(features, unbiased, atol=1e-3)
    for ours, theirs in zip(
        *(torch.autograd.grad(x.square().sum(), [visual.proj, visual.ln_pre.weight]) for x in (features, expected)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_pictures_keep_137_of_196(seed: int) -> None:
    """70 % whatever the target ratio says, as soon as one picture of the batch is busy enough."""
    masks = choose(photos_BCHW(8, 224, seed), MaskingConfig("cluster-reference"), seed, patch_size=16)
    assert masks.selection.cu_seqlens_B1.diff().tolist() == [137] * 8


def test_a_dull_batch_keeps_what_is_visible() -> None:
    """Flat images are one cluster: nothing but class tokens is left."""
    flat = torch.full((2, 3, 32, 32), 0.7)
    masks = choose(flat, MaskingConfig("cluster-reference"))
    assert masks.selection.kept_K.numel() == 0
    assert masks.visible_BT is not None
    assert masks.visible_BT.tolist() == [[True], [True]]


def test_float_mask_adds_one_to_visible_pairs() -> None:
    """What the transcription rests on: cast to float, True is not "hidden" but a bonus of 1."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(4, 1, batch_first=True)
    x, visible = torch.randn(1, 3, 4), torch.tensor([[True, False, True]])
    pairs = visible[:, :, None] & visible[:, None, :]
    _, weights = attention(x, x, x, attn_mask=pairs.float())
    query, key, _ = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    assert torch.allclose(weights, (query @ key.mT / 2 + pairs).softmax(-1), atol=1e-6)
