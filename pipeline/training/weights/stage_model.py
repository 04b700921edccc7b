"""The model that a stage trains: its size, the weights it begins with, and how it is computed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from model.attention import choose_backend
from model.clip import CLIP
from model.config import CLIPConfig
from model.heads import ConceptHead
from model.masked_words import MaskedWordCLIP
from model.towers import resize_grid
from pipeline.recipe import Precision
from pipeline.training.checkpoints.checkpoint import WEIGHTS, read_tensors
from pipeline.training.stage_plan import Stage

_POSITIONS = "visual.positional_embedding"


def count_parameters(config: CLIPConfig) -> int:
    """Parameters of a model, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CLIP(config).parameters())


def make_model(stage: Stage, checkpoint: Path | None, device: torch.device) -> CLIP:
    """The stage's model with new weights, the same on every rank, or with those of the stage before.

    checkpoint: the last one of the stage before; of another image size, if its positional embeddings are resized
    """
    _seed_generators(stage.seed)
    clip = MaskedWordCLIP(stage.model) if stage.masks_words else CLIP(stage.model)
    add_heads(clip, stage)
    if checkpoint is not None:
        _load_weights(clip, checkpoint / WEIGHTS)
    return clip.to(device)


def add_heads(clip: CLIP, stage: Stage) -> None:
    """The layers that the stage's objectives need beside the towers, with new weights; none by default."""
    curriculum = stage.curriculum
    if curriculum is not None and stage.num_predicted:
        counts = [concept.count for concept in curriculum.concepts.concepts]
        clip.heads["concepts"] = ConceptHead(stage.model.embed_dim, counts, curriculum.concepts.captions)


def _seed_generators(seed: int) -> None:
    """Begin: python's, numpy's and torch's generators, the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _load_weights(clip: CLIP, file: Path) -> None:
    weights = read_tensors(file)
    weights[_POSITIONS] = resize_grid(weights[_POSITIONS], clip.config.vision.num_patches)
    clip.load_weights(weights)


def speed_up(clip: CLIP, stage: Stage, precision: Precision) -> None:
    """How the model is computed, not what; before DeepSpeed wraps it."""
    backend = stage.recipe.model.attention
    if backend == "auto":  # known from here on, and to the compiler
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
        backend = choose_backend(clip.logit_scale.device, dtype)
    clip.use_backend(backend)
    if stage.recipe.train.activation_checkpointing:
        clip.checkpoint_blocks()
    if stage.recipe.train.compile:
        clip.compile_blocks(image_tokens_vary=not stage.masking.is_budget_constant)
