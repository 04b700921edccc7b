"""Floating-point operations of a training step on packed tokens; a multiplication with an addition counts as two.

B pairs, K patches kept, N tokens of a tower, D its width, P values of a patch, E embed_dim
"""

from __future__ import annotations

from collections.abc import Sequence

from model.config import CLIPConfig, TextConfig

# The gradient of a product with respect to each of its two factors costs as much as the product.
_FORWARD_AND_BACKWARD = 3


def step_flops(config: CLIPConfig, patches_kept: Sequence[int], caption_lengths: Sequence[int]) -> int:
    """Operations of forward and backward for one batch, from the patches kept of each image and its caption's tokens.

    Matrix products alone: of the towers (the last block on the pooled token, if it is one) and of the loss. The
    paddings of buckets, norms, activations, the choice of patches and the optimiser are not counted.
    """
    vision, text = config.vision, config.text
    B, K = len(patches_kept), sum(patches_kept)
    lengths = [kept + 1 for kept in patches_kept]
    whole_blocks = vision.layers - (vision.pool == "class")
    image = whole_blocks * _block(vision.width, vision.mlp_ratio, lengths)
    if vision.pool != "average":  # SigLIP's attention head has the products of such a block
        image += _pooled_block(vision.width, vision.mlp_ratio, lengths)
    words = (text.layers - (text.pool == "last")) * _block(text.width, text.mlp_ratio, caption_lengths)
    if text.pool == "last":
        words += _pooled_block(text.width, text.mlp_ratio, caption_lengths)
    projections = 2 * B * config.embed_dim * (vision.width + text.width)
    patch_embedding = 2 * K * 3 * vision.patch_size**2 * vision.width
    # pixels need no gradient
    towers = _FORWARD_AND_BACKWARD * (image + words + projections) + 2 * patch_embedding
    return towers + loss_flops(B, config.embed_dim)


def masked_word_flops(text: TextConfig, caption_lengths: Sequence[int], predicted: int) -> int:
    """Operations of a step that predicts so many masked tokens of a batch of captions (model/masked_words.py)."""
    words = text.layers * _block(text.width, text.mlp_ratio, caption_lengths)
    transform = 2 * predicted * text.width**2
    return _FORWARD_AND_BACKWARD * (words + transform) + label_flops(predicted, text.width, text.vocab_size)


def label_flops(rows: int, width: int, classes: int) -> int:
    """Operations of a head over labels (model/heads.py): logits, then the gradients of both sides."""
    return 3 * 2 * rows * width * classes


def loss_flops(pairs: int, width: int) -> int:
    """Operations of the loss of a batch in tiles (model/loss.py): logits twice, then the gradients of both sides."""
    return 4 * 2 * pairs * pairs * width


def _block(width: int, mlp_ratio: float, lengths: Sequence[int]) -> int:
    """Forward operations of a block; causal attention counts whole, as dense kernels compute it."""
    per_token = 2 * 4 * width**2 + 2 * 2 * width * int(mlp_ratio * width)
    return sum(lengths) * per_token + 4 * width * sum(length**2 for length in lengths)


def _pooled_block(width: int, mlp_ratio: float, lengths: Sequence[int]) -> int:
    """The same of a block that is computed for one query of each sequence."""
    key_value_and_attention = sum(lengths) * (2 * 2 * width**2 + 4 * width)
    return key_value_and_attention + len(lengths) * (2 * 2 * width**2 + 2 * 2 * width * int(mlp_ratio * width))
