"""Where nothing distinguishes patches, each is kept equally often: by place, in ties, in images at their bound.

B images, L patches. Tolerances are such that a correct implementation fails once in a million runs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mask_pictures import choose, generator, kept_BL, share_tolerance
from torch import Tensor

from model.masking import MaskingConfig, PatchSelection, draw_anchors, select_patches
from model.masking.cluster import select_evenly


def shares_BL(select: Callable[[int], PatchSelection], B: int, L: int, draws: int) -> Tensor:
    """How often each patch is kept."""
    return sum(kept_BL(select(seed), B, L).float() for seed in range(draws)) / draws


def assert_share(observed: Tensor, expected: float, draws: int) -> None:
    assert (observed - expected).abs().max() < share_tolerance(expected, draws, observed.numel())


@pytest.mark.parametrize(
    ("strategy", "B", "rows", "columns", "ratio"),
    [
        ("random", 5, 3, 3, 0.5),  # 22 of 45
        ("random", 3, 1, 7, 0.3),
        ("random", 2, 4, 4, 0.9),
        ("grid", 3, 4, 4, 0.5),
        ("grid", 3, 4, 2, 0.6),
        ("grid", 1, 2, 6, 0.75),
    ],
)
def test_every_place_is_kept_equally_often(strategy: str, B: int, rows: int, columns: int, ratio: float) -> None:
    images, L, draws = torch.zeros(B, 3, 2 * rows, 2 * columns), rows * columns, 3000
    shares = shares_BL(
        lambda seed: choose(images, MaskingConfig(strategy, ratio), seed, patch_size=2).selection, B, L, draws
    )
    assert_share(shares, round((1 - ratio) * B * L) / (B * L), draws)


@pytest.mark.parametrize("kind", ["noise", "flat", "grey levels"])
def test_cluster_on_images_without_structure(kind: str) -> None:
    """No place is favoured. Noise is drawn anew each time; the others are ties alone."""
    B, L, draws = 64, 9, 40
    noise = torch.randn(draws, B, 3, 12, 12, generator=generator())
    grey_B = torch.arange(B).float() if kind == "grey levels" else torch.ones(B)
    config = MaskingConfig("cluster", 0.5, anchor_ratio=0.2)

    def select(seed: int) -> PatchSelection:
        images = grey_B[:, None, None, None].expand(B, 3, 12, 12)
        return choose(images * noise[seed] if kind == "noise" else images, config, seed, patch_size=4).selection

    assert_share(shares_BL(select, B, L, draws).mean(0), 0.5, draws * B)


def test_ties_and_surplus_are_broken_uniformly() -> None:
    """No position is favoured: neither among equal similarities nor in an image that is capped."""
    draws = 3000
    equal = torch.full((2, 10), 0.3)
    assert_share(
        shares_BL(lambda seed: select_patches(equal, 0.5, 0.3, 0.9, generator(seed)), 2, 10, draws), 0.5, draws
    )
    # one image far below the threshold is capped at 7 of 10, the other pays for it
    capped = torch.stack((torch.linspace(0, 0.1, 10), torch.full((10,), 0.9)))
    shares = shares_BL(lambda seed: select_patches(capped, 0.5, 0.3, 0.9, generator(seed)), 2, 10, draws)
    assert_share(shares[0], 0.7, draws)
    assert_share(shares[1], 0.3, draws)
    # capped, with ties at the threshold: a patch at it has the same chance as one far under it
    mixed = torch.tensor([[0.0] * 5 + [0.5] * 5, [0.5] * 10])
    shares = shares_BL(lambda seed: select_patches(mixed, 0.3, 0.3, 0.9, generator(seed)), 2, 10, draws)
    assert_share(shares, 0.7, draws)


def test_even_selection_is_fair_between_images_and_ties() -> None:
    """One patch more goes to any image alike, and a tie at the border is broken uniformly."""
    draws, scores = 3000, torch.tensor([[0.0, 1, 1, 1, 2], [5, 5, 5, 5, 5], [9, 8, 7, 6, 5]])
    counts = torch.zeros(3)
    kept = torch.zeros(3, 5)
    for seed in range(draws):
        mask = kept_BL(select_evenly(scores, 0.5, generator(seed)), 3, 5)  # 8 of 15: 3, 3 and 2
        counts += mask.sum(1) - 2
        kept += mask
    assert_share(counts / draws, 2 / 3, draws)
    assert kept[0, 0] == draws
    assert kept[0, 4] == 0
    assert_share(kept[0, 1:4] / draws, (2 / 3 * 2 + 1 / 3) / 3, draws)
    assert_share(kept[1] / draws, 8 / 15, draws)
    assert kept[2, :2].sum() == 0
    assert_share(kept[2, 2] / draws, 2 / 3, draws)


def test_anchors_are_distinct_uniform_and_as_many_as_the_paper_says() -> None:
    assert draw_anchors(50, 196, 0.03, generator()).shape == (50, 6)
    assert draw_anchors(2, 4, 0.03, generator()).shape == (2, 1)
    anchors = draw_anchors(20_000, 10, 0.3, generator())
    assert all(len(set(row)) == 3 for row in anchors.tolist())
    assert_share(anchors.flatten().bincount() / 20_000, 0.3, 20_000)
