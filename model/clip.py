"""Two towers, a temperature, and for the sigmoid loss a bias.

B pairs, D embed_dim, L patches of an image, P values of a patch, K patches kept in the batch, T padded caption length
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Backend, SelfAttention
from model.config import CLIPConfig, config_from_name
from model.heads import LabelLoss, NamedConcepts
from model.packing import PackedTokens, PatchedImages, PatchSelection, keep_all
from model.towers import TextTransformer, VisionTransformer

_MAX_LOGIT_SCALE = math.log(100)


class CLIPOutput(NamedTuple):
    """Unit-length features [B, D] of both sides, the temperature's inverse and a bias of logits, shape [1]; fp32.

    concepts: of the head that predicts them, if there is one
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    concepts: LabelLoss | None = None

    @property
    def for_pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the loss of pairs takes."""
        return self[:4]


# Where the weights of heads are in a state dict, which evaluation and exports leave out.
HEADS = "heads."


def without_heads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the two towers and what is between them alone."""
    return {name: value for name, value in weights.items() if not name.startswith(HEADS)}


class _BoundedExp(torch.autograd.Function):
    """exp(min(x, bound)) that x can leave again: beyond the bound only gradients that push back pass.

    A clamp in `forward`, unlike one on the parameter after each step, also holds where the parameter is a shard or a
    low-precision copy of the one that is optimised.
    """

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, bound: float) -> Tensor:
        scale = log_scale.clamp(max=bound).exp()
        ctx.save_for_backward(scale, log_scale >= bound)
        return scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        scale, at_bound = ctx.saved_tensors
        grad = grads[0] * scale
        return torch.where(at_bound & (grad < 0), 0.0, grad), None


class CLIP(nn.Module):
    """Contrastive image-text model on packed tokens."""

    scalar_remainders: Tensor

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config.vision, config.embed_dim)
        self.text = TextTransformer(config.text, config.embed_dim)
        # one-dimensional: DeepSpeed cannot broadcast a parameter without dimensions
        self.logit_scale = nn.Parameter(torch.full((1,), config.init_logit_scale))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        # what these two lack of their fp32 values where parameters are in 16 bits: else 98.9 is followed by 100
        self.register_buffer("scalar_remainders", torch.zeros(2), persistent=False)
        self.heads = nn.ModuleDict()  # what a stage of training adds

    @classmethod
    def from_name(cls, name: str) -> CLIP:
        """A freshly initialised model of a known name, e.g. "ViT-B-16"; ValueError for an unknown one."""
        return cls(config_from_name(name))

    def forward(
        self,
        patches_KP: Tensor,
        selection: PatchSelection,
        text: PackedTokens,
        visible_BT: Tensor | None = None,
        named: NamedConcepts | None = None,
    ) -> CLIPOutput:
        """The training pass: the kept patches of images (`PatchedImages.gather`) and their captions.

        visible_BT: tokens whose pairs get a bonus in attention (`cluster-reference` alone).
        named: what the captions name, for the head "concepts" to predict from the pictures
        """
        image_BD = self.visual(patches_KP, selection, visible_BT)
        concepts = None if named is None else cast(LabelLoss, self.heads["concepts"](image_BD, named))
        image_features_BD = F.normalize(image_BD.float(), dim=-1)
        text_features_BD = F.normalize(self.text(text).float(), dim=-1)
        remainders = self.scalar_remainders.unsqueeze(1)
        scale = _BoundedExp.apply(self.logit_scale.float() + remainders[0], _MAX_LOGIT_SCALE)
        bias = None if self.logit_bias is None else self.logit_bias.float() + remainders[1]
        return CLIPOutput(image_features_BD, text_features_BD, scale, bias, concepts)

    def encode_image(self, images_BCHW: Tensor, normalize: bool = True) -> Tensor:
        """Features [B, D] of whole images, nothing masked: uint8 RGB, or floats that are normalised; unit ones in fp32.

        Raises ValueError for images of another size than the model's.
        """
        size, images = self.config.vision.image_size, PatchedImages(images_BCHW, self.config.vision.patch_size)
        if images_BCHW.shape[2:] != (size, size):
            raise ValueError(f"{self.config.name} takes images of {size} x {size}, not {tuple(images_BCHW.shape[2:])}")
        selection = keep_all(images.num_images, images.num_patches, images.device)
        features_BD: Tensor = self.visual(images.patches().flatten(0, 1), selection)
        return F.normalize(features_BD.float(), dim=-1) if normalize else features_BD

    def encode_text(self, tokens_BT: Tensor, normalize: bool = True) -> Tensor:
        """Features [B, D] of captions: token ids ending in end-of-text, then any padding.

        Raises ValueError for a row without end-of-text, and for more tokens than the model has positions.
        """
        longest = self.config.text.context_length
        if tokens_BT.shape[1] > longest:
            raise ValueError(f"{self.config.name} takes captions of {longest} tokens, not {tokens_BT.shape[1]}")
        features_BD: Tensor = self.text(PackedTokens.from_padded(tokens_BT, self.config.text.eot_token_id))
        return F.normalize(features_BD.float(), dim=-1) if normalize else features_BD

    def first_mismatch(self, weights: Mapping[str, Tensor]) -> str | None:
        """The first parameter whose shape is not this model's, or that one side lacks, in words; None if all fit.

        Heads do not count.
        """
        expected = {name: tuple(value.shape) for name, value in without_heads(self.state_dict()).items()}
        found = {name: tuple(value.shape) for name, value in without_heads(weights).items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                return f"{name} is {found.get(name, 'absent')}, the model's is {expected.get(name, 'absent')}"
        return None

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights of both towers, and of the heads that this model has too, in the same shape."""
        own = self.state_dict()
        fits = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
        self.load_state_dict(own | fits | without_heads(weights))

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """Those that the training pass does not use, and that need no gradients."""
        yield from ()

    def use_backend(self, backend: Backend) -> None:
        """Force a way to compute attention; "auto" chooses by device and precision (model/attention.py)."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.backend = backend

    def checkpoint_blocks(self) -> None:
        """Recompute each transformer block in the backward pass: less memory for a third more time."""
        for tower in (self.visual, self.text):
            tower.transformer.checkpoint_blocks = True

    def compile_blocks(self, image_tokens_vary: bool = False) -> None:
        """Compile the blocks around attention; captions differ in total length, images where they are said to."""
        self.visual.transformer.compile_blocks(dynamic=image_tokens_vary)
        self.text.transformer.compile_blocks(dynamic=True)
