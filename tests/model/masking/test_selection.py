"""Selection by a common threshold, against a slow implementation, and what permuting the batch does.

B images, L patches, K kept
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_pictures import choose, generator, kept_BL, pictures_BCHW
from torch import Tensor

from model.masking import MaskingConfig, anchor_similarity, draw_anchors, patchify, select_patches
from model.masking.cluster import select_evenly, select_with_threshold


@given(
    B=st.integers(1, 9),
    L=st.integers(1, 60),
    target=st.floats(0, 0.95),
    minimum=st.floats(0, 0.95),
    maximum=st.floats(0, 0.95),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_selection_keeps_the_budget_within_bounds(
    B: int, L: int, target: float, minimum: float, maximum: float, levels: int, seed: int
) -> None:
    similarity = torch.randint(0, levels, (B, L), generator=generator(seed)) / levels - 0.5
    selection, threshold = select_with_threshold(similarity, target, minimum, maximum, generator(seed))
    K = round((1 - target) * B * L)
    assert selection.kept_K.numel() == K
    assert torch.equal(selection.kept_K, selection.kept_K.unique())  # ascending, no duplicates
    mask = kept_BL(selection, B, L)
    counts = mask.sum(1)
    assert torch.equal(selection.cu_seqlens_B1.diff().long(), counts)
    most = max(math.floor((1 - minimum) * L + 1e-6), math.ceil(K / B))
    fewest = min(max(1, math.floor((1 - maximum) * L + 1e-6)), K // B)
    assert counts.max() <= most
    assert counts.min() >= fewest
    for row, kept, count in zip(similarity, mask, counts, strict=True):
        if count > fewest:  # nothing above the threshold stays
            assert row[kept].max() <= threshold
        if count < most:  # nothing under it goes
            assert not (row[~kept] < threshold).any()


def slow_selection(similarity_BL: Tensor, target: float, minimum: float, maximum: float) -> tuple[list[int], list[set]]:
    """How many patches each image keeps, and the set they come from; for similarities without ties."""
    B, L = similarity_BL.shape
    K = round((1 - target) * B * L)
    most = max(math.floor((1 - minimum) * L + 1e-6), math.ceil(K / B))
    fewest = min(max(1, math.floor((1 - maximum) * L + 1e-6)), K // B)
    rows = [sorted((float(s), i) for i, s in enumerate(row)) for row in similarity_BL]
    entries = [(b, rank, s) for b, row in enumerate(rows) for rank, (s, _) in enumerate(row) if rank < most]
    forced = [entry for entry in entries if entry[1] < fewest]
    free = sorted((entry for entry in entries if entry[1] >= fewest), key=lambda entry: entry[2])
    chosen = forced + free[: K - len(forced)]
    threshold = max((s for _, rank, s in chosen if rank >= fewest), default=-math.inf)
    counts = [sum(entry[0] == b for entry in chosen) for b in range(B)]
    pools = []
    for row, count in zip(rows, counts, strict=True):
        under = [i for s, i in row if s <= threshold]
        pools.append(set(under) if count == most and len(under) > count else {i for _, i in row[:count]})
    return counts, pools


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bounds", [(0.5, 0.3, 0.8), (0.3, 0.2, 0.5), (0.75, 0.6, 0.9)])
def test_selection_equals_a_slow_one(seed: int, bounds: tuple[float, float, float]) -> None:
    patches = patchify(pictures_BCHW(7, 64, seed), 8)
    B, L, _ = patches.shape
    similarity = anchor_similarity(patches, draw_anchors(B, L, 0.03, generator(seed)))
    similarity = similarity + 1e-4 * torch.rand(B, L, generator=generator(seed))  # no ties
    selection = select_patches(similarity, *bounds, generator(seed))
    counts, pools = slow_selection(similarity, *bounds)
    assert selection.cu_seqlens_B1.diff().tolist() == counts
    for row, pool in zip(kept_BL(selection, B, L), pools, strict=True):
        assert set(row.nonzero().squeeze(1).tolist()) <= pool


def test_the_threshold_parts_kept_from_dropped() -> None:
    """Where no bound interferes, exactly what exceeds it is dropped, of any sign and size; the slow way agrees."""
    for scale, shift in ((1.0, 0.0), (1e-30, 0.0), (1e30, -5e29), (1.0, -0.5)):
        similarity = scale * torch.rand(6, 40, generator=generator()) + shift
        selection, threshold = select_with_threshold(similarity, 0.5, 0.0, 0.97, generator())
        assert torch.equal(kept_BL(selection, 6, 40), similarity <= threshold)
        assert threshold.item() == similarity.flatten().sort().values[119].item()


def test_no_threshold_where_bounds_decide_everything() -> None:
    """Nothing that a line of metrics could not hold."""
    similarity = torch.rand(4, 10, generator=generator())
    for ratios in ((0.5, 0.5, 0.5), (0.95, 0.3, 0.9)):
        selection, threshold = select_with_threshold(similarity[:1], *ratios, generator())
        assert selection.kept_K.numel() == round((1 - ratios[0]) * 10)
        assert threshold.isnan().tolist() == [True]


def test_bounds_are_whole_patches_whatever_binary_fractions_say() -> None:
    """0.9 of 100 leaves 10, though 1 - 0.9 is less than 0.1 in binary."""
    similarity = torch.stack((torch.zeros(100), torch.ones(100)))
    selection = select_patches(similarity, 0.5, 0.0, 0.9, generator())
    assert selection.cu_seqlens_B1.diff().tolist() == [90, 10]


def test_zeros_of_either_sign_tie() -> None:
    similarity = torch.tensor([[0.0, -0.0] * 20])
    kept = sum(kept_BL(select_patches(similarity, 0.5, 0.0, 0.9, generator(s)), 1, 40)[0, ::2].sum() for s in range(50))
    assert 300 < kept < 700  # 500 of 1,000, were the signs alike


def test_statistics_of_cluster_masks() -> None:
    masks = choose(pictures_BCHW(8, 64), MaskingConfig(min_mask_ratio=0.0, max_mask_ratio=0.98), seed=3)
    patches = patchify(pictures_BCHW(8, 64), 8)
    similarity = anchor_similarity(patches, draw_anchors(8, 64, 0.03, generator(3)))
    kept = kept_BL(masks.selection, 8, 64)
    assert similarity[kept].max() <= masks.threshold <= similarity[~kept].min()
    assert masks.threshold.shape == masks.flat_share.shape == ()
    for strategy in ("random", "block", "grid", "attentive"):
        masks = choose(pictures_BCHW(), MaskingConfig(strategy))
        assert masks.threshold.isnan()
        assert masks.flat_share.isnan()


def test_permuting_the_batch_permutes_the_masks() -> None:
    """Without ties and below every cap, a mask is a function of its image and of the common threshold.

    Beyond that only the distribution is equivariant: ties and surplus are drawn by place in the batch.
    """
    similarity = torch.rand(6, 40, generator=generator())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain, threshold = select_with_threshold(similarity, 0.5, 0.0, 0.9, generator(1))
    permuted, same_threshold = select_with_threshold(similarity[order], 0.5, 0.0, 0.9, generator(2))
    assert torch.equal(kept_BL(plain, 6, 40)[order], kept_BL(permuted, 6, 40))
    assert threshold == same_threshold


def test_even_selection_looks_at_each_image_alone() -> None:
    """Where all keep as many, the rest of the batch has no influence, nor have order and scale of its scores."""
    scores = torch.rand(6, 40, generator=generator())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain = kept_BL(select_evenly(scores, 0.75, generator(1)), 6, 40)
    permuted = kept_BL(select_evenly(100 * scores[order] - 7, 0.75, generator(2)), 6, 40)
    assert torch.equal(plain[order], permuted)
    assert torch.equal(plain[:1], kept_BL(select_evenly(scores[:1], 0.75, generator(3)), 1, 40))


@pytest.mark.parametrize("L", [49, 196, 13])
def test_even_selection_keeps_the_lowest_scores_of_every_image(L: int) -> None:
    """Also of images that keep one patch more than others (24.5 of 49 on average)."""
    scores = torch.rand(8, L, generator=generator()) * torch.arange(1, 9)[:, None]  # scales differ
    for ratio in (0.3, 0.5, 0.75):
        mask = kept_BL(select_evenly(scores, ratio, generator(4)), 8, L)
        for row, kept in zip(scores, mask, strict=True):
            assert row[kept].max() < row[~kept].min()
