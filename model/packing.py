"""From images and captions to packed sequences: the patches or tokens of a batch one after another, without padding.

B images or sequences in the batch, C, H, W an image, L patches of an image, P = C * patch_size**2 values of a patch,
K patches kept in the batch; N tokens in all, n_b tokens in sequence b (sum of n_b = N), T padded length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Per-channel statistics of OpenAI's CLIP training images, the convention of the field.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(
    images_BCHW: Tensor, means: Sequence[float] = PIXEL_MEAN, deviations: Sequence[float] = PIXEL_STD
) -> Tensor:
    """uint8 RGB images [B, 3, H, W] or [3, H, W] -> float32 with about zero mean and unit variance, same shape."""
    images_BCHW = images_BCHW.to(torch.float32, copy=True)  # whatever is passed stays as it is
    # channel by channel: a tensor of the statistics would have to be copied to the device, for which the host waits
    for channel_BHW, mean, std in zip(images_BCHW.unbind(-3), means, deviations, strict=True):
        channel_BHW.sub_(255 * mean).div_(255 * std)
    return images_BCHW


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, [B, C, H, W] -> [B, L, P] with P = C * patch_size**2 in (channel, row, column) order.

    Raises ValueError if the image is not a whole number of patches high and wide.
    """
    B, C, H, W = images_BCHW.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"an image of {H} x {W} pixels cannot be cut into patches of {patch_size}")
    grid = images_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch_size**2)


@dataclass(frozen=True)
class PatchedImages:
    """A batch of images, cut into patches only where and when they are needed.

    images_BCHW: uint8 RGB, normalised on the way out; or floats, taken to be normalised
    """

    images_BCHW: Tensor
    patch_size: int

    @property
    def num_images(self) -> int:
        """B."""
        return self.images_BCHW.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image as (rows, columns)."""
        _, _, H, W = self.images_BCHW.shape
        return H // self.patch_size, W // self.patch_size

    @property
    def num_patches(self) -> int:
        """L."""
        rows, columns = self.grid
        return rows * columns

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images_BCHW.device

    def normalized(self, images: slice = slice(None)) -> Tensor:
        """Normalised pixels [b, C, H, W], fp32 where they come from uint8, of some images of the batch."""
        chosen_BCHW = self.images_BCHW[images]
        return normalize_pixels(chosen_BCHW) if chosen_BCHW.dtype == torch.uint8 else chosen_BCHW

    def patches(self, images: slice = slice(None)) -> Tensor:
        """All patches of some images of the batch, normalised: [b, L, P]."""
        return patchify(self.normalized(images), self.patch_size)

    def gather(self, kept_K: Tensor) -> Tensor:
        """The patches with flat indices b * L + l, normalised: [K, P]. Dropped patches are never normalised."""
        patches_KP = patchify(self.images_BCHW, self.patch_size).flatten(0, 1).index_select(0, kept_K)
        if patches_KP.dtype != torch.uint8:
            return patches_KP
        channels = self.images_BCHW.shape[1]
        return normalize_pixels(patches_KP.unflatten(1, (channels, -1, 1))).flatten(1)


class PatchSelection(NamedTuple):
    """Patches kept in a batch: kept_K int64 flat indices b * L + l, ascending; cu_seqlens_B1 int32 prefix sums."""

    kept_K: Tensor
    cu_seqlens_B1: Tensor


def keep_all(num_images: int, num_patches: int, device: torch.device) -> PatchSelection:
    """Nothing dropped."""
    kept_K = torch.arange(num_images * num_patches, device=device)
    cu_seqlens_B1 = torch.arange(num_images + 1, device=device, dtype=torch.int32) * num_patches
    return PatchSelection(kept_K, cu_seqlens_B1)


def lengths_to_cu_seqlens(lengths_B: Tensor) -> Tensor:
    """Prefix sums with a leading zero: [B] -> int32 [B + 1], the form variable-length kernels take."""
    cu_seqlens_B1 = torch.zeros(lengths_B.numel() + 1, dtype=torch.int32, device=lengths_B.device)
    torch.cumsum(lengths_B, 0, dtype=torch.int32, out=cu_seqlens_B1[1:])
    return cu_seqlens_B1


class Bucket(NamedTuple):
    """n sequences of similar length as a padded [n, T] rectangle; `valid_nT` is None where nothing is padded."""

    num_sequences: int
    padded_length: int
    valid_nT: Tensor | None


@dataclass(frozen=True)
class Buckets:
    """A batch rearranged for dense attention: all buckets' cells one after another, M cells in all.

    token_index_M: the packed token in each cell (a padding cell repeats its sequence's last token)
    cell_N: the cell of each packed token, the inverse
    sequence_index_B, sequence_position_B: the order of the sequences in the buckets, and its inverse
    """

    shapes: list[Bucket]
    token_index_M: Tensor
    cell_N: Tensor
    sequence_index_B: Tensor
    sequence_position_B: Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Where each sequence of a packed batch begins and ends; made once, used by every layer.

    cu_seqlens_B1: int32 prefix sums of the lengths
    max_length: no sequence is longer; known to the host without asking the device
    granularity: sequences whose lengths round up to the same multiple of this share a bucket
    attention_bias_BHTT: added to the attention logits of sequences that all have length T (`cluster-reference` alone)
    """

    cu_seqlens_B1: Tensor
    max_length: int
    granularity: int = 16
    attention_bias_BHTT: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens_B1.numel() - 1

    @cached_property
    def lengths_B(self) -> Tensor:
        """Tokens of each sequence."""
        return self.cu_seqlens_B1.diff()

    @cached_property
    def first_token_B(self) -> Tensor:
        """Index of each sequence's first token in the packed sequence."""
        return self.cu_seqlens_B1[:-1].long()

    @cached_property
    def last_token_B(self) -> Tensor:
        """Index of each sequence's last token in the packed sequence."""
        return self.cu_seqlens_B1[1:].long() - 1

    @property
    def one_each_B1(self) -> Tensor:
        """Prefix sums of one query per sequence, int32."""
        return torch.arange(self.num_sequences + 1, dtype=torch.int32, device=self.cu_seqlens_B1.device)

    def sequence_N(self, num_tokens: int) -> Tensor:
        """The sequence that each of the N tokens belongs to; N is passed so that the host need not ask for it."""
        index_B = torch.arange(self.num_sequences, device=self.cu_seqlens_B1.device)
        return index_B.repeat_interleave(self.lengths_B, output_size=num_tokens)

    @cached_property
    def uniform_length(self) -> int | None:
        """The length, if all sequences have the same: then the packed batch is a rectangle as it stands.

        Reads the lengths on the host: a synchronisation on CUDA.
        """
        shortest, longest = torch.aminmax(self.lengths_B)
        return int(longest) if int(shortest) == int(longest) else None

    @cached_property
    def buckets(self) -> Buckets:
        """Every sequence in exactly one bucket. Reads the lengths on the host: a synchronisation on CUDA."""
        device = self.cu_seqlens_B1.device
        starts_B, lengths_B = self.first_token_B.cpu(), self.lengths_B.cpu()
        steps_B = (lengths_B + self.granularity - 1) // self.granularity
        sequence_index_B = steps_B.argsort(stable=True)
        cell_N = torch.empty(int(lengths_B.sum()), dtype=torch.long)
        shapes, token_indices, first_cell, first_sequence = [], [], 0, 0
        for num_sequences in steps_B.unique(return_counts=True)[1].tolist():
            sequence_n = sequence_index_B[first_sequence : first_sequence + num_sequences]
            lengths_n1, starts_n1 = lengths_B[sequence_n, None], starts_B[sequence_n, None]
            padded_length = int(lengths_n1.max())
            offset_T = torch.arange(padded_length)
            valid_nT = offset_T < lengths_n1
            token_index_nT = starts_n1 + torch.minimum(offset_T, lengths_n1 - 1)
            cells_nT = first_cell + torch.arange(num_sequences * padded_length).view_as(token_index_nT)
            cell_N[token_index_nT[valid_nT]] = cells_nT[valid_nT]
            mask = None if bool(valid_nT.all()) else valid_nT.to(device)
            shapes.append(Bucket(num_sequences, padded_length, mask))
            token_indices.append(token_index_nT.flatten())
            first_cell += cells_nT.numel()
            first_sequence += num_sequences
        return Buckets(
            shapes,
            torch.cat(token_indices).to(device),
            cell_N.to(device),
            sequence_index_B.to(device),
            sequence_index_B.argsort().to(device),
        )


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of a batch of captions: tokens_N int64 and the layout that separates them."""

    tokens_N: Tensor
    layout: PackedLayout

    @staticmethod
    def from_padded(tokens_BT: Tensor, eot_token_id: int) -> PackedTokens:
        """Drop what follows each row's first end-of-text token.

        Raises ValueError if a row has none: its feature would be read at an arbitrary place.
        """
        is_eot_BT = tokens_BT == eot_token_id
        if not bool(is_eot_BT.any(dim=1).all()):
            raise ValueError(f"a caption has no end-of-text token ({eot_token_id}); was it made by another tokenizer?")
        lengths_B = is_eot_BT.int().argmax(dim=1) + 1
        keep_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B[:, None]
        return pack_tokens(tokens_BT[keep_BT], lengths_to_cu_seqlens(lengths_B), max_length=tokens_BT.shape[1])


# Captions are short: finer buckets than for images.
_TEXT_GRANULARITY = 4


def pack_tokens(tokens_N: Tensor, cu_seqlens_B1: Tensor, max_length: int) -> PackedTokens:
    """Captions that are packed already; `max_length` is the context length, or another bound."""
    return PackedTokens(tokens_N, PackedLayout(cu_seqlens_B1, max_length, granularity=_TEXT_GRANULARITY))
