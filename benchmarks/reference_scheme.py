"""The released cluster-masking code's way of masking, at its real cost: for comparison in benchmarks only.

What it computes is in model/masking/reference.py; how it computes it is kept here: similarities of all pairs of
patches, three dense masks, one length for the whole batch, patches embedded before they are dropped, and a dense
additive mask in every attention layer of open_clip's model.

B images, L patches of an image, P values of a patch, A anchors, k patches kept of each image, T = k + 1 tokens
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.packing import patchify

ANCHOR_RATIO, MIN_MASK_RATIO, THRESHOLD = 0.03, 0.3, 0.5


@torch.no_grad()
def reference_op(images_BCHW: Tensor, patch_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Kept patches [B, k] and the additive attention mask [B, T, T] before it is repeated for the heads."""
    patches_BLP = patchify(images_BCHW, patch_size)
    variance = patches_BLP.var(dim=-1, keepdim=True)
    patches_BLP = (patches_BLP - patches_BLP.mean(dim=-1, keepdim=True)) / (variance + 1e-6) ** 0.5
    norm_BL = patches_BLP.norm(dim=-1)
    similarity_BLL = torch.einsum("bip,bjp->bij", patches_BLP, patches_BLP) / torch.einsum(
        "bi,bj->bij", norm_BL, norm_BL
    )
    B, L, _ = patches_BLP.shape
    shuffle_BL = torch.rand(B, L, device=images_BCHW.device).argsort(dim=1)
    anchors_BA = shuffle_BL[:, int(L * (1 - ANCHOR_RATIO)) :]
    of_anchors_BAL = similarity_BLL.gather(1, anchors_BA[:, :, None].repeat(1, 1, L))
    masked_BL = ((of_anchors_BAL > THRESHOLD).float() * -1e12).sum(1)
    with_class_BT = torch.cat((masked_BL.new_zeros(B, 1), masked_BL), dim=1).to(dtype)
    pairs_BTT = torch.zeros(B, L + 1, L + 1, device=images_BCHW.device, dtype=dtype)
    pairs_BTT += with_class_BT[:, :, None] + with_class_BT[:, None, :]

    is_masked_BL = (masked_BL != 0).to(dtype)
    k = min(int(L * (1 - MIN_MASK_RATIO)), L - int(is_masked_BL.sum(-1).min().item()))
    kept_Bk = (torch.rand(B, L, device=images_BCHW.device).exp() * is_masked_BL).argsort(dim=-1)[:, :k]
    tokens_BT = torch.cat((kept_Bk.new_zeros(B, 1), kept_Bk + 1), dim=1)
    pairs_BTT = pairs_BTT.gather(1, tokens_BT[:, :, None].repeat(1, 1, L + 1))
    return kept_Bk, pairs_BTT.gather(2, tokens_BT[:, None, :].repeat(1, k + 1, 1))


def reference_image_features(visual: nn.Module, images_BCHW: Tensor) -> Tensor:
    """open_clip's image tower as the released code runs it in training: [B, 3, H, W] -> [B, embed_dim]."""
    x_BLD = visual.conv1(images_BCHW).flatten(2).transpose(1, 2)
    class_B1D = visual.class_embedding.to(x_BLD.dtype).expand(len(x_BLD), 1, -1)
    x_BTD = torch.cat((class_B1D, x_BLD), dim=1) + visual.positional_embedding.to(x_BLD.dtype)
    kept_Bk, pairs_BTT = reference_op(images_BCHW, visual.conv1.kernel_size[0], x_BTD.dtype)
    kept_BkD = x_BTD[:, 1:].gather(1, kept_Bk[:, :, None].repeat(1, 1, x_BTD.shape[-1]))
    x_BTD = visual.ln_pre(torch.cat((x_BTD[:, :1], kept_BkD), dim=1))
    heads = visual.transformer.resblocks[0].attn.num_heads
    is_visible = pairs_BTT.repeat(heads, 1, 1) == 0
    for block in visual.transformer.resblocks:
        bias = is_visible.to(x_BTD.dtype)  # in every layer, as released
        normed = block.ln_1(x_BTD)
        x_BTD = x_BTD + block.attn(normed, normed, normed, need_weights=False, attn_mask=bias)[0]
        x_BTD = x_BTD + block.mlp(block.ln_2(x_BTD))
    return visual.ln_post(x_BTD[:, 0]) @ visual.proj
