"""What to drop: the settings of all strategies, and the share that is dropped as training goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

STRATEGIES = ("none", "random", "cluster", "block", "grid", "pgs", "attentive", "cluster-reference")
SCHEDULES = ("constant", "linear", "cosine")


def _option(default: Any, description: str) -> Any:
    """An option of a recipe's section `masking`: its default, and its meaning for help and docs."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class MaskingConfig:
    """Which patches each step drops (docs/masking.md); raises ValueError for what cannot be."""

    strategy: str = _option("cluster", " | ".join(STRATEGIES))
    target_mask_ratio: float = _option(0.5, "share of the batch's patches that is dropped, exactly")
    min_mask_ratio: float = _option(0.3, "each image loses at least this share (cluster, pgs)")
    max_mask_ratio: float = _option(0.9, "each image loses at most this share (cluster, pgs)")
    anchor_ratio: float = _option(0.03, "share of an image's patches that seed clusters (cluster, pgs)")
    embedding_mix: float = _option(0.0, "weight of patch-embedding similarity at the end (cluster); 0: pixels alone")
    ratio_schedule: str = _option("constant", "target over training: " + " | ".join(SCHEDULES))
    final_mask_ratio: float | None = _option(None, "target at the last step, for another schedule")
    ema_decay: float = _option(0.996, "per step, of the copy whose attention scores patches (attentive)")

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown masking strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")
        if self.ratio_schedule not in SCHEDULES:
            raise ValueError(f"unknown masking.ratio_schedule {self.ratio_schedule!r}; known: {', '.join(SCHEDULES)}")
        for name in ("target_mask_ratio", "min_mask_ratio", "max_mask_ratio", "final_mask_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 <= ratio < 1:
                raise ValueError(f"masking.{name} must be in [0, 1), not {ratio}")
        if self.min_mask_ratio > self.max_mask_ratio:
            raise ValueError(f"min_mask_ratio {self.min_mask_ratio} exceeds max_mask_ratio {self.max_mask_ratio}")
        if (self.final_mask_ratio is None) != (self.ratio_schedule == "constant"):
            raise ValueError("masking.final_mask_ratio and a ratio_schedule other than constant need each other")
        if not 0 < self.anchor_ratio < 1:
            raise ValueError(f"masking.anchor_ratio must be in (0, 1), not {self.anchor_ratio}")
        if not 0 <= self.embedding_mix <= 1:
            raise ValueError(f"masking.embedding_mix must be in [0, 1], not {self.embedding_mix}")
        if self.embedding_mix and self.strategy != "cluster":
            raise ValueError(f"masking.embedding_mix belongs to the strategy cluster, not {self.strategy}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"masking.ema_decay must be in [0, 1), not {self.ema_decay}")

    @property
    def is_budget_constant(self) -> bool:
        """Whether as many patches are kept of every batch of a size, so that shapes never change."""
        is_constant = self.ratio_schedule == "constant" and self.strategy != "cluster-reference"
        return is_constant or self.strategy == "none"

    def leaves_a_patch(self, num_patches: int) -> bool:
        """Whether there is one for each image at every time, of images of so many patches."""
        if self.strategy in ("none", "cluster-reference"):  # the latter's target is a threshold
            return True
        return (1 - max(self.mask_ratio(0), self.mask_ratio(1))) * num_patches > 1 - 1e-6

    def mask_ratio(self, progress: float) -> float:
        """Target share at `progress` through training, from 0 at the first step to 1 at the last."""
        if self.final_mask_ratio is None:
            return self.target_mask_ratio
        done = progress if self.ratio_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.target_mask_ratio + done * (self.final_mask_ratio - self.target_mask_ratio)
