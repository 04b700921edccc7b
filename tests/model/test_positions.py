"""Positional embeddings on another grid; equality with open_clip's own resizing is in test_export_parity.py."""

from __future__ import annotations

import pytest
import torch

from model.clip import CLIP
from model.towers import fit_positions, resize_grid


def test_the_same_grid_is_left_alone() -> None:
    positions = torch.randn(17, 4)
    assert torch.equal(resize_grid(positions, 16), positions)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (7, 16)])
def test_a_linear_ramp_stays_one_inside_the_image(old: int, new: int) -> None:
    """Column c of a grid of G lies at (c + 1/2) / G of the image's width; bicubic filters keep what is linear."""
    column, row = ((torch.arange(old) + 0.5) / old).expand(old, old), ((torch.arange(old) + 0.5) / old)[:, None]
    patches = torch.stack((column, row.expand(old, old)), dim=-1).flatten(0, 1)
    resized = resize_grid(torch.cat((torch.full((1, 2), 5.0), patches)), new * new)
    assert torch.equal(resized[0], torch.full((2,), 5.0))  # the class token's is no part of the grid
    grid = resized[1:].view(new, new, 2)
    inside = slice(new // 3, new - new // 3)  # at the border the filter is cut off
    expected = ((torch.arange(new) + 0.5) / new)[inside]
    assert torch.allclose(grid[inside, inside, 0], expected.expand(len(expected), -1), atol=0.02)
    assert torch.allclose(grid[inside, inside, 1], expected[:, None].expand(-1, len(expected)), atol=0.02)


def test_what_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="15 positions of patches are not a square"):
        resize_grid(torch.zeros(16, 2), 9)


def test_captions_keep_their_first_positions_and_never_get_new_ones() -> None:
    weights = CLIP.from_name("ViT-test-8").state_dict()
    fitted = fit_positions(weights, num_patches=16, context_length=32)
    assert fitted.keys() == weights.keys()
    assert torch.equal(fitted["text.positional_embedding"], weights["text.positional_embedding"][:32])
    with pytest.raises(ValueError, match="captions have 77 positions, fewer than the 78 of the model"):
        fit_positions(weights, num_patches=16, context_length=78)
