"""AdamW, its parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pipeline.recipe import OptimizerSection


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, embeddings and the temperature do not (as CLIP's training does)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = (
            parameter.ndim > 1 and "embedding" not in name.rpartition(".")[2] and id(parameter) not in embeddings
        )
        (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """torch's AdamW: fused, and nothing to compile at run time."""
    return torch.optim.AdamW(
        parameter_groups(model, section.weight_decay),
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=True,
    )


def learning_rate(step: float, total_steps: int, section: OptimizerSection) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `lr * final_lr_ratio` at the last step.

    Steps count from 0; where a run went on with other batches than it began with, they come in fractions.
    """
    if step < section.warmup_steps:
        return min(section.lr, section.lr * (step + 1) / section.warmup_steps)
    progress = (step - section.warmup_steps) / max(1, total_steps - section.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return section.lr * (section.final_lr_ratio + (1 - section.final_lr_ratio) * cosine)
