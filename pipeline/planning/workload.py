"""What one rank computes in a step, and how: taken from a stage of a recipe and its DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from model.clip import CLIP
from model.config import CLIPConfig, TextConfig, VisionConfig
from model.heads import ConceptHead
from model.loss import LossKind
from model.masked_words import MaskedWordCLIP
from pipeline.data.masked_words import MASKED_SHARE
from pipeline.recipe import OptimizerSection, Precision, Recipe
from pipeline.training.engines.engine_config import (
    accumulates_in_fp32,
    offload_device,
    precision_of,
    reduces_in_fp32,
    zero_stage,
)
from pipeline.training.engines.optimizer import freeze_towers, parameter_groups
from pipeline.training.stage_plan import Stage

# What DeepSpeed 0.19 takes where a configuration does not say.
_REDUCE_BUCKET = 500_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_LIVE = 1_000_000_000

# How attention is computed, for what it keeps: flash kernels, torch's kernel on rectangles, or plain products.
Attention = Literal["varlen", "rectangles", "products"]


@dataclass(frozen=True)
class Tower:
    """A tower's size and its load for one micro-batch; `square_lengths` is the sum of the squared lengths."""

    width: int
    layers: int
    heads: int
    hidden: int
    sequences: int
    tokens: int
    square_lengths: int

    @staticmethod
    def of(config: VisionConfig | TextConfig, sequences: int, length: float) -> Tower:
        """A tower of `sequences` sequences of about `length` tokens."""
        return Tower(
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            hidden=int(config.mlp_ratio * config.width),
            sequences=sequences,
            tokens=round(sequences * length),
            square_lengths=round(sequences * length**2),
        )


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model's parameters, in elements.

    trained: those that are not frozen; vision, text: of them in each tower
    with_muon: of them with one optimizer state instead of AdamW's two
    largest, largest_group: the largest tensor, and the largest of the optimizer's groups
    persistent: in tensors so small that ZeRO stage 3 keeps them whole
    linear: of layers whose gradients DeepSpeed's autocast averages in 16 bits
    embeddings: of token embeddings, which no product uses
    """

    total: int
    trained: int
    vision: int
    text: int
    with_muon: int
    largest: int
    largest_group: int
    persistent: int
    linear: int
    embeddings: int

    @staticmethod
    @cache
    def of(
        config: CLIPConfig,
        section: OptimizerSection,
        persistence_threshold: int = _PERSISTENCE_THRESHOLD,
        concepts: int = 0,
        masks_words: bool = False,
    ) -> Parameters:
        """Counted on a model without memory; `concepts` that a head of it predicts, or masked words."""
        with torch.device("meta"):
            clip = MaskedWordCLIP(config) if masks_words else CLIP(config)
            if concepts:
                clip.heads["concepts"] = ConceptHead(config.embed_dim, [1] * concepts, concepts)
        freeze_towers(clip, section)
        sizes = [parameter.numel() for parameter in clip.parameters()]
        groups = parameter_groups(clip, section)
        group_sizes = [_elements(group["params"]) for group in groups]
        return Parameters(
            total=sum(sizes),
            trained=sum(group_sizes),
            vision=_elements(p for p in clip.visual.parameters() if p.requires_grad),
            text=_elements(p for p in clip.text.parameters() if p.requires_grad),
            with_muon=sum(size for size, group in zip(group_sizes, groups, strict=True) if group["matrices"]),
            largest=max(parameter.numel() for group in groups for parameter in group["params"]),
            largest_group=max(group_sizes),
            persistent=sum(size for size in sizes if size < persistence_threshold),
            linear=_elements(p for p in _parameters_of(clip, nn.Linear) if p.requires_grad),
            embeddings=_elements(_parameters_of(clip, nn.Embedding)),
        )


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _parameters_of(clip: CLIP, kind: type[nn.Module]) -> Iterator[nn.Parameter]:
    for module in clip.modules():
        if isinstance(module, kind):
            yield from module.parameters()


@dataclass(frozen=True)
class Workload:
    """One rank's step: `accumulation_steps` micro-batches of `micro_batch_size` pairs through both towers.

    patches: kept of all images of a micro-batch; captions alone have none, and an image tower without sequences
    masked_words: tokens of a micro-batch that are predicted, where captions are read alone; else 0
    norm_in_fp64: whether DeepSpeed itself computes the norm of gradients
    reduce_bucket, max_live: elements, as in the DeepSpeed configuration
    sums_in_fp32, reduces_in_fp32: 16-bit gradients of micro-batches, and of ranks
    """

    model: CLIPConfig
    parameters: Parameters
    vision: Tower
    text: Tower
    patches: int
    masked_words: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    zero_stage: int
    precision: Precision
    checkpoint_blocks: bool
    attention: Attention
    overlaps_reduction: bool
    norm_in_fp64: bool
    reduce_bucket: int
    max_live: int
    sums_in_fp32: bool
    reduces_in_fp32: bool
    offload_optimizer: bool
    offload_parameters: bool
    attentive: bool
    averages_weights: bool
    tile_size: int
    exchange: Literal["gather", "ring"]
    cache_gradients: bool
    loss: LossKind

    @property
    def blocks(self) -> int:
        """Transformer blocks that a micro-batch passes."""
        return self.text.layers + (0 if self.masked_words else self.vision.layers)

    def without_recomputation(self) -> Workload:
        """The same with every activation stored."""
        return replace(self, checkpoint_blocks=False)

    @property
    def compute_bytes(self) -> int:
        """Of a number in matrix products and what they leave."""
        return 4 if self.precision == "fp32" else 2

    @property
    def weight_bytes(self) -> int:
        """Of a number in weights, gradients, and between blocks: autocast keeps those in fp32."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def sum_bytes(self) -> int:
        """Of a number in the sum of micro-batches' gradients."""
        return 4 if self.sums_in_fp32 else self.weight_bytes

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients on their way between ranks."""
        if self.reduces_in_fp32:
            return 4 * self.parameters.trained
        saved = 2 * self.parameters.linear if self.precision == "autocast" else 0
        return self.weight_bytes * self.parameters.trained - saved

    @property
    def global_micro_batch(self) -> int:
        """G, pairs of all ranks' micro-batches: what features are compared with at once."""
        return self.micro_batch_size * self.world_size


def workload_of(
    stage: Stage, config: dict[str, Any], caption_tokens: float, on_gpu: bool = True, has_flash: bool = True
) -> Workload:
    """The load of one rank in a stage, for captions of `caption_tokens` on average; a GPU may have flash attention."""
    recipe, model, batches = stage.recipe, stage.model, stage.batches
    zero, precision = config.get("zero_optimization", {}), precision_of(config)
    pairs, kept = batches.micro_batch_size, stage.patches_kept
    number, images = zero_stage(config), 0 if stage.masks_words else pairs
    threshold = int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD))
    return Workload(
        model=model,
        parameters=Parameters.of(model, recipe.optimizer, threshold, stage.num_predicted, stage.masks_words),
        vision=Tower.of(model.vision, images, kept + 1),
        text=Tower.of(model.text, pairs, caption_tokens),
        patches=round(images * kept),
        masked_words=round(MASKED_SHARE * pairs * caption_tokens) if stage.masks_words else 0,
        micro_batch_size=pairs,
        accumulation_steps=batches.accumulation_steps,
        world_size=batches.world_size,
        zero_stage=number,
        precision=precision,
        checkpoint_blocks=recipe.train.activation_checkpointing,
        attention=_attention(recipe, precision, on_gpu, has_flash),
        overlaps_reduction=bool(zero.get("overlap_comm", number == 3)),
        norm_in_fp64=bool(zero.get("compute_grad_norm", True)),
        reduce_bucket=int(zero.get("reduce_bucket_size", _REDUCE_BUCKET)),
        max_live=int(zero.get("stage3_max_live_parameters", _MAX_LIVE)),
        sums_in_fp32=accumulates_in_fp32(config),
        reduces_in_fp32=reduces_in_fp32(config),
        offload_optimizer=offload_device(config, "optimizer") == "cpu",
        offload_parameters=offload_device(config, "param") == "cpu",
        attentive=stage.masking.strategy == "attentive",
        averages_weights=recipe.optimizer.ema_decay is not None,
        tile_size=recipe.loss.tile_size,
        exchange=recipe.loss.exchange,
        cache_gradients=recipe.loss.cache_gradients and not stage.masks_words,
        loss=recipe.loss.kind,
    )


def _attention(recipe: Recipe, precision: Precision, on_gpu: bool, has_flash: bool) -> Attention:
    if on_gpu and has_flash and precision != "fp32" and recipe.model.attention in ("auto", "varlen"):
        return "varlen"
    return "products" if not on_gpu and precision != "fp32" else "rectangles"
