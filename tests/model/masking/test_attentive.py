"""Attention of the class token, against an explicit float64 forward pass; the copy that follows; what stays.

B images, L patches, T = L + 1 tokens, D width, H heads
"""

from __future__ import annotations

import copy

import torch
from mask_pictures import generator, kept_BL, photos_BCHW, pictures_BCHW, share_tolerance
from torch import Tensor

from model.class_attention import AttentiveCopy, class_attention
from model.clip import CLIP
from model.config import config_from_name
from model.masking import Guidance, MaskingConfig, PatchedImages, choose_patches
from model.packing import normalize_pixels
from model.towers import VisionTransformer
from model.transformer import Block


def make_tower(seed: int = 0) -> VisionTransformer:
    """Biases and norms away from their neutral values, so that a forgotten one shows."""
    torch.manual_seed(seed)
    visual = CLIP(config_from_name("ViT-test-8")).visual
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return visual


def slow_class_attention(visual: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Plain formulas on one image at a time, [T, D], in float64."""
    weights = {name: value.detach().double() for name, value in visual.named_parameters()}
    heads = visual.transformer.heads

    def norm(x_TD: Tensor, name: str) -> Tensor:
        centred = x_TD - x_TD.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    rows = []
    for image in images_BCHW.double():
        patches = [image[:, y : y + 8, x : x + 8].flatten() for y in range(0, 32, 8) for x in range(0, 32, 8)]
        embedded = torch.stack(patches) @ weights["patch_embedding.weight"].T
        x = torch.cat((weights["class_embedding"][None], embedded)) + weights["positional_embedding"]
        x, received = norm(x, "ln_pre"), []
        for layer in range(len(visual.transformer.blocks)):
            p = f"transformer.resblocks.{layer}"
            qkv = norm(x, f"{p}.ln_1") @ weights[f"{p}.attn.in_proj_weight"].T + weights[f"{p}.attn.in_proj_bias"]
            attended = []
            for query, key, value in zip(*(part.chunk(heads, dim=1) for part in qkv.chunk(3, dim=1)), strict=True):
                logits = query @ key.T / key.shape[1] ** 0.5
                attention = logits.exp() / logits.exp().sum(1, keepdim=True)
                received.append(attention[0])
                attended.append(attention @ value)
            x = x + torch.cat(attended, 1) @ weights[f"{p}.attn.out_proj.weight"].T + weights[f"{p}.attn.out_proj.bias"]
            hidden = norm(x, f"{p}.ln_2") @ weights[f"{p}.mlp.c_fc.weight"].T + weights[f"{p}.mlp.c_fc.bias"]
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            x = x + hidden @ weights[f"{p}.mlp.c_proj.weight"].T + weights[f"{p}.mlp.c_proj.bias"]
        rows.append(torch.stack(received).mean(0)[1:])
    return torch.stack(rows)


def test_class_attention_equals_the_plain_formulas() -> None:
    visual, photos = make_tower(), photos_BCHW(3, 32)
    attention = class_attention(visual, PatchedImages(photos, 8))
    expected = slow_class_attention(visual, normalize_pixels(photos))
    assert attention.dtype == torch.float32
    assert not attention.requires_grad
    assert torch.allclose(attention.double(), expected, atol=1e-6)
    assert expected.std() > 0.01  # the test could fail
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(class_attention(visual, PatchedImages(photos[order], 8)), attention[order], atol=1e-6)


def test_the_copy_moves_a_share_of_the_way() -> None:
    visual = make_tower()
    follower = AttentiveCopy(visual.bfloat16(), dict(visual.named_parameters()))
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in follower.visual.parameters())
    expected = {name: value.detach().double() for name, value in visual.named_parameters()}
    for decay in (0.9, 0.5, 0.0):
        with torch.no_grad():
            for parameter in visual.parameters():
                parameter.add_(1)
        before = {name: value.detach().clone() for name, value in visual.named_parameters()}
        follower.update(before, decay)
        for name, value in before.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
            assert torch.allclose(follower.visual.get_parameter(name).double(), expected[name], atol=1e-5)
            assert torch.equal(value, visual.get_parameter(name))
    assert torch.equal(follower.visual.proj, visual.proj.float())  # a decay of 0 copies


def test_what_is_kept_is_what_is_attended_to() -> None:
    visual, images = make_tower(), PatchedImages(photos_BCHW(5, 32), 8)
    guidance = Guidance(class_attention=AttentiveCopy(visual, dict(visual.named_parameters())).scores)
    attention = slow_class_attention(visual, images.normalized())
    for ratio in (0.3, 0.5, 0.77):
        selection = choose_patches(images, MaskingConfig("attentive", ratio), generator(), guidance).selection
        for row, kept in zip(attention, kept_BL(selection, 5, 16), strict=True):
            assert row[kept].min() > row[~kept].max()


def test_equal_attention_is_a_lottery() -> None:
    images, draws = PatchedImages(pictures_BCHW(2, 24), 8), 2000
    guidance = Guidance(class_attention=lambda images: torch.full((2, 9), 1 / 9))
    kept = torch.zeros(2, 9)
    for seed in range(draws):
        kept += kept_BL(choose_patches(images, MaskingConfig("attentive"), generator(seed), guidance).selection, 2, 9)
    assert (kept / draws - 0.5).abs().max() < share_tolerance(0.5, draws, 18)


def test_a_copy_of_a_compiled_tower_has_its_own_weights() -> None:
    visual = make_tower()
    visual.transformer.compile_blocks(dynamic=False)
    for block in copy.deepcopy(visual).transformer.blocks:
        assert block.before_attention.__self__ is block
        assert block.after_attention.__self__ is block
    for block in AttentiveCopy(visual, dict(visual.named_parameters())).visual.transformer.blocks:
        assert block.before_attention.__func__ is Block.before_attention
