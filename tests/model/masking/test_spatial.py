"""Masks that look at places alone: what block and grid drop, and where blocks lie.

B images, R rows, C columns, L = R * C patches
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mask_pictures import choose, generator, kept_BL, share_tolerance

from model.masking import MaskingConfig
from model.masking.spatial import block_scores

GRIDS = [(14, 14), (7, 7), (6, 10), (1, 12), (9, 1)]


def dropped_BRC(strategy: str, B: int, grid: tuple[int, int], ratio: float, seed: int = 0) -> np.ndarray:
    rows, columns = grid
    images = torch.zeros(B, 3, 2 * rows, 2 * columns)
    selection = choose(images, MaskingConfig(strategy, ratio), seed, patch_size=2).selection
    return ~kept_BL(selection, B, rows * columns).view(B, rows, columns).numpy()


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    (rows,), (columns,) = mask.any(axis=1).nonzero(), mask.any(axis=0).nonzero()
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75, 0.9])
def test_a_block_is_a_rectangle_up_to_its_rim(grid: tuple[int, int], ratio: float) -> None:
    """Inside its bounding box nothing is kept but patches of the outermost rows and columns."""
    for mask in dropped_BRC("block", 40, grid, ratio):
        if mask.sum() < 2:
            continue
        box = mask[bounding_box(mask)]
        height, width = box.shape
        assert box[1:-1, 1:-1].all()
        assert (~box).sum() <= 2 * max(height, width)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_patches_nearer_to_the_middle_of_a_block_go_first(grid: tuple[int, int], ratio: float) -> None:
    """Whatever share is dropped, it is a rectangle: the scores above any value form one."""
    for scores in block_scores(20, grid, ratio, generator()).view(20, *grid).numpy():
        for value in np.unique(scores)[1:]:
            mask = scores >= value
            assert mask[bounding_box(mask)].all()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7, 0.9])
def test_the_rectangle_has_the_right_area_and_lies_inside(ratio: float) -> None:
    """On a fine grid, to a row and a column: one that left the image would be smaller in it."""
    inside = block_scores(200, (40, 40), ratio, generator()).view(200, 40, 40) >= -0.5
    height, width = inside.any(2).sum(1), inside.any(1).sum(1)
    assert torch.equal(inside.sum((1, 2)), height * width)
    assert ((height * width - ratio * 1600).abs() <= height + width + 1).all()
    assert (height / width).max() < 2.3
    assert (width / height).max() < 2.3


def slow_block(rng: np.random.Generator, grid: tuple[int, int], ratio: float) -> np.ndarray:
    """A rectangle of relative area `ratio`, sides in a proportion from 1:2 to 2:1, anywhere inside; nearest patches."""
    rows, columns = grid
    proportion = 2 ** rng.uniform(-1, 1)
    height = min(max((ratio * proportion) ** 0.5, ratio), 1)
    width = ratio / height
    top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
    distance = np.empty(grid)
    for row in range(rows):
        for column in range(columns):
            down = abs((row + 0.5) / rows - (top + height / 2)) / height
            across = abs((column + 0.5) / columns - (left + width / 2)) / width
            distance[row, column] = max(down, across)
    order = np.lexsort((rng.random(rows * columns), distance.ravel()))
    mask = np.zeros(rows * columns, dtype=bool)
    mask[order[: round(ratio * rows * columns)]] = True
    return mask.reshape(grid)


@pytest.mark.parametrize(("grid", "ratio"), [((6, 6), 0.25), ((6, 4), 0.5), ((1, 8), 0.75), ((8, 8), 0.7)])
def test_blocks_lie_where_those_of_a_slow_drawing_lie(grid: tuple[int, int], ratio: float) -> None:
    rng, draws = np.random.default_rng(0), 4000
    slow = np.mean([slow_block(rng, grid, ratio) for _ in range(draws)], axis=0)
    fast = dropped_BRC("block", draws, grid, ratio).mean(axis=0)
    assert np.abs(slow - fast).max() < 2**0.5 * share_tolerance(0.5, draws, slow.size)
    assert np.abs(fast - fast[::-1, ::-1]).max() < 2**0.5 * share_tolerance(0.5, draws, slow.size)
    if min(grid) > 1:
        assert fast[grid[0] // 2, grid[1] // 2] > fast[0, 0] + 0.1  # the price of blocks


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", [(14, 14), (4, 6)])
def test_grid_drops_the_same_corners_of_every_cell(ratio: float, grid: tuple[int, int]) -> None:
    """Which corners is drawn per image, all alike."""
    rows, columns = grid
    patterns = []
    for mask in dropped_BRC("grid", 50, grid, ratio):
        cells = mask.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
        assert (cells == cells[0]).all()
        assert cells[0].sum() == 4 * ratio
        patterns.append(tuple(cells[0]))
    assert len(set(patterns)) == {0.25: 4, 0.5: 6, 0.75: 4}[ratio]


def test_between_such_shares_one_corner_goes_in_random_cells() -> None:
    masks = dropped_BRC("grid", 200, (4, 4), 0.375)
    counts = np.zeros(4)
    for mask in masks:
        cells = mask.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
        always, sometimes = cells.all(axis=0), cells.any(axis=0)
        assert (always.sum(), sometimes.sum()) == (1, 2)
        counts += (cells & ~always).any(axis=1)
    assert np.abs(counts / 200 - 0.5).max() < share_tolerance(0.5, 200, 4)


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_places_do_not_look_at_pixels(strategy: str) -> None:
    config = MaskingConfig(strategy)
    plain, noisy = (choose(images, config, seed=4) for images in (torch.zeros(3, 3, 64, 64), torch.randn(3, 3, 64, 64)))
    assert torch.equal(plain.selection.kept_K, noisy.selection.kept_K)
