"""The optimizer and its groups of parameters: which decay, and which share of the learning rate each has."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from model.clip import CLIP
from pipeline.recipe import OptimizerSection
from pipeline.training.engines.muon import MatrixShape, MuonAdamW

_BLOCK = re.compile(r"(visual|text)\.transformer\.resblocks\.(\d+)\.")
_INPUT = re.compile(r"(visual|text)\.(class_embedding|positional_embedding|patch_embedding|token_embedding|ln_pre)")


def freeze_towers(clip: CLIP, section: OptimizerSection) -> None:
    """A tower whose learning rate is none gets no gradients, and no memory for them or for optimizer states.

    Nor does what the training pass does not use.
    """
    clip.visual.requires_grad_(section.image_lr_ratio > 0)
    clip.text.requires_grad_(section.text_lr_ratio > 0)
    for parameter in clip.idle_parameters():
        parameter.requires_grad_(False)


def parameter_groups(clip: CLIP, section: OptimizerSection) -> list[dict[str, Any]]:
    """Parameters that are treated alike, each group with `weight_decay`, `lr_ratio` and `matrices` (muon.py).

    Matrices decay, embeddings of tokens and positions where `decay_embeddings` says so (then all that has more than one
    dimension does, as in open_clip); biases, norms, the class token and the temperature never do.
    """
    embeddings = {id(m.weight) for m in clip.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, float, float], dict[str, Any]] = {}
    for name, parameter in clip.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = (
            parameter.ndim > 1 and "embedding" not in name.rpartition(".")[2] and id(parameter) not in embeddings
        )
        has_muon = section.name == "muon" and is_matrix and bool(_BLOCK.match(name))
        decays = is_matrix or (section.decay_embeddings and parameter.ndim > 1)
        decay, ratio = section.weight_decay if decays else 0.0, _lr_ratio(name, clip, section)
        new = {"params": [], "weight_decay": decay, "lr_ratio": ratio, "matrices": []}
        group = groups.setdefault((has_muon, decay, ratio), new)
        group["params"].append(parameter)
        if has_muon:
            group["matrices"].append(_matrix_shape(name, parameter))
    return list(groups.values())


def _matrix_shape(name: str, parameter: nn.Parameter) -> MatrixShape:
    """Query, key and value are three matrices in one parameter."""
    rows, columns = parameter.shape
    return (3, rows // 3, columns) if name.endswith("in_proj_weight") else (1, rows, columns)


def _lr_ratio(name: str, clip: CLIP, section: OptimizerSection) -> float:
    """The tower's, and layer decay by the distance from the tower's output (Bao et al. 2022, BEiT, appendix)."""
    tower = name.partition(".")[0]
    if tower not in ("visual", "text"):
        return 1.0
    is_image = tower == "visual"
    ratio = section.image_lr_ratio if is_image else section.text_lr_ratio
    layers = clip.config.vision.layers if is_image else clip.config.text.layers
    block = _BLOCK.match(name)
    if block:
        return ratio * section.layer_decay ** (layers - int(block[2]))
    return ratio * section.layer_decay ** (layers + 1) if _INPUT.match(name) else ratio


def make_optimizer(clip: CLIP, section: OptimizerSection) -> torch.optim.Optimizer:
    """torch's fused AdamW of what is not frozen, or Muon with it; nothing to compile at run time."""
    groups = parameter_groups(clip, section)
    if section.name == "muon":
        groups = [group | {"momentum": section.muon_momentum} for group in groups]
    kind = MuonAdamW if section.name == "muon" else torch.optim.AdamW
    return kind(groups, lr=section.lr, betas=(section.beta1, section.beta2), eps=section.eps, fused=True)
