"""Whole training steps to be timed: forward, backward and fused AdamW in bf16 autocast, on a fixed batch.

B pairs, S image side, T padded caption length, L patches of an image
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pictures import smooth_images
from torch import Tensor, nn

from model.attention import Backend
from model.clip import CLIP
from model.loss import contrastive_loss
from model.masking import MaskingConfig, PatchedImages, choose_patches
from model.packing import lengths_to_cu_seqlens, pack_tokens

Step = Callable[[], None]

# Caption lengths between 9 and 20 tokens, start and end included: 14.5 on average, as Flickr8k's have in CLIP's BPE.
SHORTEST, LONGEST, CONTEXT = 9, 20, 77
END_TOKEN = 49407


@dataclass(frozen=True)
class TrainingBatch:
    """Normalised images [B, 3, S, S], captions padded to the context [B, T], their lengths [B]."""

    images_BCHW: Tensor
    tokens_BT: Tensor
    lengths_B: Tensor

    def to(self, device: torch.device) -> TrainingBatch:
        """The batch on a device."""
        return TrainingBatch(self.images_BCHW.to(device), self.tokens_BT.to(device), self.lengths_B.to(device))

    @property
    def caption_tokens(self) -> float:
        """Mean length of a caption."""
        return float(self.lengths_B.float().mean())


def make_batch(batch: int, image_size: int) -> TrainingBatch:
    """Made-up images and captions."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.arange(batch) % (LONGEST - SHORTEST + 1) + SHORTEST
    tokens_BT = torch.randint(1, 40_000, (batch, CONTEXT), generator=generator)
    return TrainingBatch(smooth_images(batch, image_size), _end_and_pad(tokens_BT, lengths_B), lengths_B)


def read_batch(
    folder: Path, batch: int, preprocess: Callable[[object], Tensor], tokenize: Callable[[list[str]], Tensor]
) -> TrainingBatch:
    """The first pairs of a folder: images, and beside each a .txt of the same name whose first line is the caption."""
    from PIL import Image

    captions = [path for path in sorted(folder.glob("*.txt")) if path.with_suffix(".jpg").exists()][:batch]
    if len(captions) < batch:
        raise SystemExit(f"error: {folder} holds {len(captions)} pairs (name.jpg, name.txt), {batch} are needed")
    images = [preprocess(Image.open(path.with_suffix(".jpg")).convert("RGB")) for path in captions]
    tokens_BT = tokenize([path.read_text().splitlines()[0] for path in captions])
    return TrainingBatch(torch.stack(images), tokens_BT, (tokens_BT == END_TOKEN).int().argmax(dim=1) + 1)


def _end_and_pad(tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    tokens_BT[torch.arange(len(tokens_BT)), lengths_B - 1] = END_TOKEN
    return tokens_BT * (torch.arange(tokens_BT.shape[1]) < lengths_B[:, None])


def train_with(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    """Forward, backward, update."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    device_type = parameters[0].device.type

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type, dtype=torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()

    return step


def packed_step(
    name: str,
    batch: TrainingBatch,
    strategy: str,
    target_mask_ratio: float = 0.5,
    checkpoint: bool = False,
    compiled: bool = False,
    backend: Backend = "auto",
) -> Step:
    """This project's model on the batch's device; masks are drawn within the step, blocks recomputed if asked."""
    device = batch.images_BCHW.device
    clip = CLIP.from_name(name).to(device)
    clip.use_backend(backend)
    if checkpoint:
        clip.checkpoint_blocks()
    if compiled:
        clip.compile_blocks(image_tokens_vary=False)
    is_token_BT = torch.arange(batch.tokens_BT.shape[1], device=device) < batch.lengths_B[:, None]
    tokens_N, cu_seqlens_B1 = batch.tokens_BT[is_token_BT], lengths_to_cu_seqlens(batch.lengths_B)
    generator = torch.Generator(device).manual_seed(0)
    masking = MaskingConfig(strategy=strategy, target_mask_ratio=target_mask_ratio)

    def loss_of() -> Tensor:
        images = PatchedImages(batch.images_BCHW, clip.config.vision.patch_size)
        selection = choose_patches(images, masking, generator).selection
        text = pack_tokens(tokens_N, cu_seqlens_B1, batch.tokens_BT.shape[1])
        return contrastive_loss(*clip(images.gather(selection.kept_K), selection, text).for_pairs)

    return train_with(clip, loss_of)
