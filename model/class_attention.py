"""Which patches the class token looks at, by a slowly moving copy of the image tower: A-CLIP's choice of patches.

"Attentive Mask CLIP" (Yang et al., arXiv 2212.08653): patches that the class token of an exponential moving average of
the image tower attends to stay, averaged over heads and layers. It costs a forward pass of whole images.

B images, L patches of an image, T = L + 1 tokens, N = B * T tokens in all, H heads, E width of a head
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.attention import dense_attention
from model.packing import PatchedImages, keep_all
from model.towers import VisionTransformer


@torch.no_grad()
def class_attention(visual: VisionTransformer, images: PatchedImages) -> Tensor:
    """Share of the class token's attention that each patch gets, averaged over heads and layers: fp32 [B, L]."""
    B, L = images.num_images, images.num_patches
    x_ND, _ = visual.tokens(images.patches().flatten(0, 1), keep_all(B, L, images.device))
    x_ND = visual.ln_pre(x_ND)
    attention_BT = torch.zeros(B, L + 1, device=images.device)
    for block in visual.transformer.blocks:
        qkv_N3HE = block.before_attention(x_ND)
        query_BTHE, key_BTHE, value_BTHE = qkv_N3HE.unflatten(0, (B, L + 1)).unbind(2)
        logits_BHT = torch.einsum("bhe,bthe->bht", query_BTHE[:, 0], key_BTHE) * query_BTHE.shape[-1] ** -0.5
        attention_BT += logits_BHT.float().softmax(dim=-1).mean(dim=1)
        # whole images are a rectangle: no layout whose lengths the host would have to read
        attended_BTHE = dense_attention(query_BTHE, key_BTHE, value_BTHE, mask=None, causal=False)
        x_ND = block.after_attention(x_ND, attended_BTHE.reshape(x_ND.shape))
    return attention_BT[:, 1:] / len(visual.transformer.blocks)


class AttentiveCopy(nn.Module):
    """The moving average of an image tower, fp32, whose class attention chooses the patches.

    It begins as `weights`, the tower's parameters by name (of which DeepSpeed may keep the tower itself only shards).
    """

    def __init__(self, visual: VisionTransformer, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.visual = VisionTransformer(visual.config, visual.embed_dim).requires_grad_(False).eval()
        self.visual.load_state_dict(dict(weights))
        self.visual.to(next(iter(weights.values())).device)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Move a share 1 - decay of the way to `weights`, the tower's parameters by name."""
        for name, average in self.visual.named_parameters():
            average.lerp_(weights[name].detach().to(average.dtype), 1 - decay)

    def scores(self, images: PatchedImages, dtype: torch.dtype = torch.float32) -> Tensor:
        """`class_attention` of the copy, its products computed in `dtype`: fp32 [B, L]."""
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return class_attention(self.visual, images)
