"""Do weights that were written and read back give the same features?

B images, n captions, T padded caption length, S image size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from formats.errors import UserError
from model.clip import CLIP
from model.patches import normalize_pixels
from pipeline.image_sources import load_image, read_images
from pipeline.inference import InferenceModel

TOLERANCE = 1e-5
MAX_CAPTIONS = 256


@dataclass(frozen=True)
class Examples:
    """Normalised pixels [B, 3, S, S] and token ids [n, T], and where they are from."""

    images_BCHW: Tensor
    tokens_BT: Tensor
    images_from: str
    captions_from: str

    @property
    def description(self) -> str:
        """What is compared, in words."""
        return (
            f"{len(self.images_BCHW)} images of {self.images_from}, {len(self.tokens_BT)} captions of "
            f"{self.captions_from}"
        )


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference between two models' unit-length features."""

    image: float
    text: float

    @property
    def is_small(self) -> bool:
        """Within TOLERANCE; false for features that are not finite."""
        return self.image <= TOLERANCE and self.text <= TOLERANCE


def random_examples(model: InferenceModel, count: int = 4) -> Examples:
    """Noise images, and captions of 1 to `count` random tokens; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(0, 256, (count, 3, model.image_size, model.image_size), generator=generator)
    encoder, config = model.tokenizer.encoder, model.clip.config.text
    longest = min(count, config.context_length - 2)
    tokens_BT = torch.full((count, longest + 2), encoder.end_token_id)
    tokens_BT[:, 0] = encoder.start_token_id
    for row in range(count):
        words = torch.randint(0, encoder.start_token_id, (min(row + 1, longest),), generator=generator)
        tokens_BT[row, 1 : 1 + len(words)] = words
    return Examples(normalize_pixels(images_BCHW), tokens_BT, "random noise", "random tokens")


def examples_from(directory: Path, model: InferenceModel) -> Examples:
    """Some images and captions of an evaluation set, a shard directory or a folder.

    Raises UserError if the directory is none of these, or an image does not decode.
    """
    samples = read_images(directory)
    images = [load_image(sample.image, model.image_size) for sample in samples]
    tokens_BT = model.tokenizer.encode_batch([sample.caption for sample in samples])
    return Examples(normalize_pixels(torch.stack(images)), tokens_BT, str(directory), str(directory))


def with_captions(examples: Examples, path: Path, model: InferenceModel) -> Examples:
    """The same images, and the captions of a text file, one per line: the first MAX_CAPTIONS that are not empty.

    Raises UserError if there are none.
    """
    try:
        with path.open(encoding="utf-8") as file:
            captions = list(islice((line.strip() for line in file if line.strip()), MAX_CAPTIONS))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"captions cannot be read from {path}: {error}") from error
    if not captions:
        raise UserError(f"{path} is empty: expected captions, one per line")
    return replace(examples, tokens_BT=model.tokenizer.encode_batch(captions), captions_from=str(path))


@torch.inference_mode()
def reload_difference(clip: CLIP, weights: Mapping[str, Tensor], examples: Examples) -> Difference:
    """How far a new model with these weights is from `clip` (in evaluation mode, on the CPU)."""
    reloaded = CLIP(clip.config)
    reloaded.load_state_dict(weights)
    reloaded.eval()
    image_BD = clip.encode_image(examples.images_BCHW) - reloaded.encode_image(examples.images_BCHW)
    text_BD = clip.encode_text(examples.tokens_BT) - reloaded.encode_text(examples.tokens_BT)
    return Difference(image_BD.abs().max().item(), text_BD.abs().max().item())
