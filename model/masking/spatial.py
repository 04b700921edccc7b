"""Scores that look at places alone: random, one block, a regular grid. The higher the score, the sooner dropped.

B images, R rows and C columns of patches, L = R * C
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

# Sides of a dropped block differ by at most this factor.
_MAX_ASPECT = 2.0


def random_scores(num_images: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """Uniform noise: FLIP (Li et al., arXiv 2212.00794). fp32 [B, L]."""
    return torch.rand(num_images, grid[0] * grid[1], generator=generator, device=generator.device)


def block_scores(num_images: int, grid: tuple[int, int], mask_ratio: float, generator: Generator) -> Tensor:
    """High within one rectangle of random place and shape that covers `mask_ratio` of the image. fp32 [B, L].

    The block masking of CLIPA's ablation (Li et al., arXiv 2305.07017, figure 5). Patches are ordered by their
    distance to the middle of the rectangle in units of its sides, so that any share is an exact rectangle but for its
    rim. Unlike `random` this drops the middle of images more often than their border.
    """
    rows, columns = grid
    device = generator.device
    uniform_3B = torch.rand(3, num_images, generator=generator, device=device)
    aspect_B = torch.exp((2 * uniform_3B[0] - 1) * math.log(_MAX_ASPECT))
    # sides as shares of the image; one that is cut at the image's side makes the other longer
    height_B = (mask_ratio * aspect_B).sqrt().clamp(max(mask_ratio, 1e-6), 1)
    width_B = mask_ratio / height_B
    middle_row_B = (height_B / 2 + uniform_3B[1] * (1 - height_B)) * rows
    middle_column_B = (width_B / 2 + uniform_3B[2] * (1 - width_B)) * columns
    row_R = torch.arange(rows, device=device) + 0.5
    column_C = torch.arange(columns, device=device) + 0.5
    down_BR = (row_R - middle_row_B[:, None]).abs() / (height_B[:, None] * rows)
    across_BC = (column_C - middle_column_B[:, None]).abs() / (width_B.clamp_min(1e-6)[:, None] * columns)
    return -torch.maximum(down_BR[:, :, None], across_BC[:, None, :]).flatten(1)


def grid_scores(num_images: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """The same corners of every 2 x 2 cell go first, in an order drawn per image. fp32 [B, L].

    The grid masking of CLIPA's ablation (arXiv 2305.07017, figure 5): at 75 % one patch of every cell stays, at 50 %
    two. Between such shares the corner that is next goes in random cells.
    """
    rows, columns = grid
    device = generator.device
    corner_L = (
        2 * (torch.arange(rows, device=device) % 2)[:, None] + torch.arange(columns, device=device) % 2
    ).flatten()
    turn_B4 = torch.rand(num_images, 4, generator=generator, device=device).argsort(dim=1)
    noise_BL = torch.rand(num_images, rows * columns, generator=generator, device=device)
    return turn_B4[:, corner_L] + noise_BL
