"""Properties of the masks, and equality with a slow implementation written from the paper's description.

B images, L patches, P values of a patch, A anchors, K kept
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from model.masking import (
    STRATEGIES,
    Guidance,
    MaskingConfig,
    PatchedImages,
    PatchSelection,
    anchor_similarity,
    choose_patches,
    draw_anchors,
    patchify,
    select_patches,
)

CLUSTER = MaskingConfig(strategy="cluster")


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def picture_BCHW(B: int = 6, size: int = 64, seed: int = 0) -> Tensor:
    """Smooth colour fields with a few rectangles: something like images, with structure to cluster."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    images = []
    for _ in range(B):
        image = np.stack([np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y) for _ in range(3)])
        for _ in range(4):
            top, left = rng.integers(0, size - 8, 2)
            image[:, top : top + 20, left : left + 20] = rng.normal(0, 1, 3)[:, None, None]
        images.append(image + rng.normal(0, rng.choice([0.01, 0.5]), image.shape))
    return torch.tensor(np.stack(images), dtype=torch.float32)


def adversarial_images() -> dict[str, Tensor]:
    size = 64
    black_border = picture_BCHW(4, size)
    black_border[:, :, :16] = -1.8
    two_colours = torch.full((4, 3, size, size), -1.0)
    two_colours[:, :, :, size // 2 :] = 1.0
    lines = torch.zeros(4, 3, size, size)
    lines[:, :, ::7] = 1.0
    return {
        "flat": torch.full((4, 3, size, size), 0.7),
        "zero": torch.zeros(4, 3, size, size),
        "grey levels": torch.linspace(-2, 2, 4)[:, None, None, None].expand(4, 3, size, size).contiguous(),
        "black border": black_border,
        "two colours": two_colours,
        "noise": torch.randn(4, 3, size, size, generator=generator()),
        "one-pixel lines": lines,
        "half flat, half noise": torch.cat((torch.zeros(2, 3, size, size), torch.randn(2, 3, size, size))),
    }


def choose(images: Tensor, config: MaskingConfig, seed: int = 0, patch_size: int = 8) -> PatchSelection:
    return choose_patches(PatchedImages(images, patch_size), config, generator(seed), GUIDANCE).selection


GUIDANCE = Guidance(class_attention=lambda images: images.patches().float().var(2))


def kept_mask(selection: PatchSelection, B: int, L: int) -> Tensor:
    mask = torch.zeros(B * L, dtype=torch.bool)
    mask[selection.kept_K] = True
    return mask.view(B, L)


def test_patchify_cuts_rows_and_columns() -> None:
    image = torch.arange(3 * 8 * 12).view(1, 3, 8, 12)
    patches = patchify(image, 4)
    assert patches.shape == (1, 6, 48)
    for row in range(2):
        for column in range(3):
            expected = image[0, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].flatten()
            assert torch.equal(patches[0, row * 3 + column], expected)
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify(image, 5)


@pytest.mark.parametrize("patch_size", [14, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_similarity_equals_float64_loops(patch_size: int, dtype: torch.dtype) -> None:
    patches = patchify(picture_BCHW(3, patch_size * 6), patch_size).to(dtype)
    B, L, _ = patches.shape
    anchors = draw_anchors(B, L, 0.1, generator())
    similarity = anchor_similarity(patches, anchors)
    assert similarity.dtype == torch.float32
    reference = patches.double()
    for b in range(B):
        for p in range(L):
            values = []
            for a in anchors[b].tolist():
                u, v = (reference[b, i] - reference[b, i].mean() for i in (a, p))
                values.append(1.0 if a == p else float(u @ v / (u.norm() * v.norm())))
            assert similarity[b, p] == pytest.approx(max(values), abs=2e-5)


def test_similarity_survives_low_contrast() -> None:
    faint = 2.0 + 5e-3 * torch.randn(2, 10, 768, generator=generator())
    anchors = torch.tensor([[0, 1], [3, 4]])
    exact = faint.double() - faint.double().mean(2, keepdim=True)
    exact = exact / exact.norm(dim=2, keepdim=True)
    expected = (exact.take_along_dim(anchors[:, :, None], 1) @ exact.mT).amax(1)
    assert torch.allclose(anchor_similarity(faint, anchors), expected.float(), atol=1e-4)


def test_flat_patches_are_one_cluster_per_colour() -> None:
    patches = torch.zeros(1, 6, 48)
    patches[0, 2:4] = 1.5
    patches[0, 4:] = torch.randn(2, 48, generator=generator())
    similarity = anchor_similarity(patches, torch.tensor([[0]]))[0]
    assert similarity.tolist() == [1, 1, 0, 0, 0, 0]
    assert anchor_similarity(patches, torch.tensor([[4]]))[0, :4].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"cluster-reference"}))
@pytest.mark.parametrize("name", adversarial_images())
def test_budget_is_exact_on_awkward_images(strategy: str, name: str) -> None:
    images = adversarial_images()[name]
    patches = patchify(images, 8)
    B, L, _ = patches.shape
    assert not anchor_similarity(patches, draw_anchors(B, L, 0.03, generator())).isnan().any()
    selection = choose(images, MaskingConfig(strategy=strategy))
    expected = B * L if strategy == "none" else round(0.5 * B * L)
    assert selection.kept_K.numel() == expected == int(selection.cu_seqlens_B1[-1])
    assert selection.cu_seqlens_B1.dtype == torch.int32


@given(
    B=st.integers(1, 9),
    L=st.integers(1, 60),
    target=st.floats(0, 0.95),
    minimum=st.floats(0, 0.95),
    maximum=st.floats(0, 0.95),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
@settings(max_examples=300, deadline=None)
def test_selection_keeps_the_budget_within_bounds(
    B: int, L: int, target: float, minimum: float, maximum: float, levels: int, seed: int
) -> None:
    similarity = torch.randint(0, levels, (B, L), generator=generator(seed)) / levels
    selection = select_patches(similarity, target, minimum, maximum, generator(seed))
    K = round((1 - target) * B * L)
    kept, cu_seqlens = selection.kept_K, selection.cu_seqlens_B1
    assert kept.numel() == K
    assert torch.equal(kept, kept.unique())  # ascending, no duplicates
    counts = kept_mask(selection, B, L).sum(1)
    assert torch.equal(cu_seqlens.diff().long(), counts)
    most = max(math.floor((1 - minimum) * L + 1e-6), math.ceil(K / B))
    fewest = min(max(1, math.floor((1 - maximum) * L + 1e-6)), K // B)
    assert counts.max() <= most
    assert counts.min() >= fewest


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
def test_selection_equals_a_slow_one(seed: int) -> None:
    patches = patchify(picture_BCHW(7, 64, seed), 8)
    B, L, _ = patches.shape
    similarity = anchor_similarity(patches, draw_anchors(B, L, 0.03, generator(seed)))
    similarity = similarity + 1e-4 * torch.rand(B, L, generator=generator(seed))  # no ties
    selection = select_patches(similarity, 0.5, 0.3, 0.8, generator(seed))
    counts, pools = slow_selection(similarity, 0.5, 0.3, 0.8)
    assert selection.cu_seqlens_B1.diff().tolist() == counts
    for row, pool in zip(kept_mask(selection, B, L), pools, strict=True):
        assert set(row.nonzero().squeeze(1).tolist()) <= pool


def keep_probability(similarity_BL: Tensor, draws: int = 4000) -> Tensor:
    kept = torch.zeros(similarity_BL.shape)
    for seed in range(draws):
        kept += kept_mask(select_patches(similarity_BL, 0.5, 0.3, 0.9, generator(seed)), *similarity_BL.shape)
    return kept / draws


def test_ties_and_surplus_are_broken_uniformly() -> None:
    """No position is favoured: neither among equal similarities nor in an image that is capped."""
    all_equal = keep_probability(torch.full((2, 10), 0.3))
    assert (all_equal - 0.5).abs().max() < 0.05
    # one image far below the threshold is capped at 7 of 10, the other pays for it
    capped = keep_probability(torch.stack((torch.linspace(0, 0.1, 10), torch.full((10,), 0.9))))
    assert (capped[0] - 0.7).abs().max() < 0.05
    assert (capped[1] - 0.3).abs().max() < 0.05


def test_random_keeps_every_patch_equally_often_and_images_alike() -> None:
    images = torch.randn(5, 3, 24, 24, generator=generator())
    config = MaskingConfig(strategy="random")
    kept = torch.zeros(5, 9)
    for seed in range(3000):
        selection = choose(images, config, seed)
        counts = selection.cu_seqlens_B1.diff()
        assert counts.max() - counts.min() <= 1
        kept += kept_mask(selection, 5, 9)
    assert (kept / 3000 - 22 / 45).abs().max() < 0.05  # round(22.5) = 22 of 45


def test_masked_patches_are_the_similar_ones() -> None:
    """An image of two textures: anchors of one texture take most of it with them."""
    left = torch.randn(48, generator=generator(1))
    right = torch.randn(48, generator=generator(2))
    patches = torch.stack([left] * 8 + [right] * 8)[None] + 0.05 * torch.randn(1, 16, 48, generator=generator(3))
    similarity = anchor_similarity(patches, torch.tensor([[2]]))
    kept = kept_mask(select_patches(similarity, 0.5, 0.3, 0.9, generator()), 1, 16)[0]
    assert not kept[:8].any()
    assert kept[8:].all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_deterministic_in_the_generator_and_different_between_seeds(strategy: str) -> None:
    config = MaskingConfig(strategy=strategy)
    first, again, other = (choose(picture_BCHW(), config, seed) for seed in (5, 5, 6))
    assert torch.equal(first.kept_K, again.kept_K)
    assert torch.equal(first.kept_K, other.kept_K) == (strategy in ("none", "attentive"))


@pytest.mark.parametrize("strategy", ["random", "cluster"])
def test_target_zero_is_no_masking(strategy: str) -> None:
    nothing_dropped = choose(picture_BCHW(), MaskingConfig(strategy="none"))
    selection = choose(picture_BCHW(), MaskingConfig(strategy=strategy, target_mask_ratio=0.0))
    assert torch.equal(selection.kept_K, nothing_dropped.kept_K)
    assert torch.equal(selection.cu_seqlens_B1, nothing_dropped.cu_seqlens_B1)
    similarity = torch.rand(4, 9, generator=generator())
    assert select_patches(similarity, 0.0, 0.3, 0.9, generator()).kept_K.tolist() == list(range(36))


def test_permuting_the_batch_permutes_the_masks() -> None:
    """Without ties and below every cap the selection is a function of each image and the common threshold."""
    similarity = torch.rand(6, 40, generator=generator())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain = kept_mask(select_patches(similarity, 0.5, 0.0, 0.9, generator(1)), 6, 40)
    permuted = kept_mask(select_patches(similarity[order], 0.5, 0.0, 0.9, generator(2)), 6, 40)
    assert torch.equal(plain[order], permuted)


def test_anchors_are_distinct_and_as_many_as_the_paper_says() -> None:
    anchors = draw_anchors(50, 196, 0.03, generator())
    assert anchors.shape == (50, 6)
    assert all(len(set(row)) == 6 for row in anchors.tolist())
    assert draw_anchors(2, 4, 0.03, generator()).shape == (2, 1)


@pytest.mark.parametrize(
    "wrong", [{"strategy": "clusters"}, {"target_mask_ratio": 1.0}, {"min_mask_ratio": -0.1}, {"anchor_ratio": 0.0}]
)
def test_config_refuses_nonsense(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MaskingConfig(**wrong)
