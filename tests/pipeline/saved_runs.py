"""Runs with one checkpoint of a tiny model, and a merges file of the size of CLIP's."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import torch

from model.clip import CLIP
from model.config import Pool, TextAttention, config_from_name
from model.masking import MaskingConfig
from pipeline.data.captions import Tokenizer, _byte_symbols
from pipeline.training.checkpoints.checkpoint import Contents
from pipeline.training.checkpoints.checkpoint_writer import publish, write_model_files
from pipeline.training.progress import Progress


def synthetic_merges(path: Path, count: int = 48_894) -> Path:
    """A merges file of the size of CLIP's, with merges of no meaning."""
    pairs = islice(product(_byte_symbols(), repeat=2), count)
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *map(" ".join, pairs)]).encode()))
    return path


def save_run(
    run: Path,
    tokenizer: Tokenizer,
    diverged: bool = False,
    pool: Pool = "class",
    logit_bias: float | None = None,
    text_attention: TextAttention = "causal",
) -> Path:
    """A run with one checkpoint of a tiny model."""
    directory = run / "checkpoints" / "step_00000007"
    directory.mkdir(parents=True)
    config = replace(config_from_name("ViT-test-8"), init_logit_bias=logit_bias)
    encoder = tokenizer.encoder
    text = replace(
        config.text, vocab_size=encoder.vocab_size, eot_token_id=encoder.end_token_id, attention=text_attention
    )
    clip = CLIP(replace(config, text=text, vision=replace(config.vision, pool=pool)))
    weights = dict(clip.state_dict())
    if diverged:
        weights["visual.ln_post.bias"] = torch.full((32,), torch.nan)
    save_model(directory, clip, weights, Progress(7, 112), tokenizer)
    return run


def save_model(
    directory: Path, clip: CLIP, weights: Mapping[str, torch.Tensor], progress: Progress, tokenizer: Tokenizer
) -> None:
    """A checkpoint as far as evaluation reads it."""
    files = write_model_files(directory, clip, weights, progress, tokenizer, MaskingConfig())
    publish(directory, Contents(progress, 1, 0, "fp32", {}, {"train": {}}, files))
