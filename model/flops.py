"""Floating-point operations of a training step on packed tokens; a multiplication with an addition counts as two.

B pairs, K patches kept, N tokens of a tower, D its width, P values of a patch, E embed_dim
"""

from __future__ import annotations

from collections.abc import Sequence

from model.config import CLIPConfig

# The gradient of a product with respect to each of its two factors costs as much as the product.
_FORWARD_AND_BACKWARD = 3


def step_flops(config: CLIPConfig, patches_kept: Sequence[int], caption_lengths: Sequence[int]) -> int:
    """Operations of forward and backward for one batch, from the patches kept of each image and its caption's tokens.

    Matrix products alone: of the towers (the last block on the pooled token) and of the loss. The paddings of buckets,
    norms, activations, the choice of patches and the optimiser are not counted.
    """
    vision, text = config.vision, config.text
    B, K = len(patches_kept), sum(patches_kept)
    image = _tower(vision.width, vision.layers, vision.mlp_ratio, [kept + 1 for kept in patches_kept])
    words = _tower(text.width, text.layers, text.mlp_ratio, caption_lengths)
    projections = 2 * B * config.embed_dim * (vision.width + text.width)
    logits = 2 * 2 * B * B * config.embed_dim
    patch_embedding = 2 * K * 3 * vision.patch_size**2 * vision.width
    # pixels need no gradient
    return _FORWARD_AND_BACKWARD * (image + words + projections + logits) + 2 * patch_embedding


def _tower(width: int, layers: int, mlp_ratio: float, lengths: Sequence[int]) -> int:
    """Forward operations of a transformer whose last block is computed for one token of each sequence.

    Causal attention counts whole, as dense kernels compute it.
    """
    N, B = sum(lengths), len(lengths)
    mlp = 2 * 2 * width * int(mlp_ratio * width)
    qkv, output = 2 * 3 * width**2, 2 * width**2
    pairs = sum(length**2 for length in lengths)
    blocks = (layers - 1) * (N * (qkv + output + mlp) + 4 * pairs * width)
    key_value = N * (qkv * 2 // 3)
    pooled = B * (qkv // 3 + output + mlp) + 4 * N * width
    return blocks + key_value + pooled
