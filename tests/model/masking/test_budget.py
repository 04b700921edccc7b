"""Every strategy keeps exactly as many patches as it says, whatever the images, and draws from its generator alone.

B images, L patches, K kept
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_pictures import awkward_images, choose, generator, kept_BL, photos_BCHW, pictures_BCHW
from torch import Tensor

from model.masking import STRATEGIES, MaskingConfig, PatchedImages, choose_patches

EXACT = sorted(set(STRATEGIES) - {"none", "cluster-reference"})
EVEN = sorted(set(EXACT) - {"cluster", "pgs"})  # images lose alike
RATIOS = [0.0, 0.3, 0.5, 0.75, 0.9]


def assert_budget(images: Tensor, config: MaskingConfig, patch_size: int, progress: float = 0.0) -> None:
    B, L = len(images), images.shape[2] // patch_size * (images.shape[3] // patch_size)
    start, end = config.target_mask_ratio, config.final_mask_ratio
    ratio = {
        "constant": lambda: start,
        "linear": lambda: start + (end - start) * progress,
        "cosine": lambda: start + (end - start) * (1 - math.cos(math.pi * progress)) / 2,
    }[config.ratio_schedule]()
    selection = choose(images, config, seed=B, patch_size=patch_size, progress=progress).selection
    K = round((1 - ratio) * B * L)
    kept = selection.kept_K
    assert kept.dtype == torch.int64
    assert selection.cu_seqlens_B1.dtype == torch.int32
    assert kept.numel() == K == int(selection.cu_seqlens_B1[-1])
    assert torch.equal(kept, kept.unique())  # ascending, no duplicates
    counts = kept_BL(selection, B, L).sum(1)
    assert torch.equal(selection.cu_seqlens_B1.diff().long(), counts)
    if config.strategy in EVEN:
        assert counts.max() - counts.min() <= 1
    elif ratio > 0:
        assert counts.max() <= max(math.floor((1 - config.min_mask_ratio) * L + 1e-6), math.ceil(K / B))
        assert counts.min() >= min(max(1, math.floor((1 - config.max_mask_ratio) * L + 1e-6)), K // B)


@given(
    strategy=st.sampled_from(EXACT),
    B=st.integers(1, 9),
    grid=st.sampled_from([(1, 1), (1, 2), (1, 11), (9, 1), (2, 2), (3, 5), (7, 7), (6, 4), (14, 14)]),
    ratio=st.sampled_from(RATIOS) | st.floats(0, 0.95),
    final=st.none() | st.sampled_from(RATIOS),
    schedule=st.sampled_from(["linear", "cosine"]),
    progress=st.floats(0, 1),
    bounds=st.sampled_from([(0.3, 0.9), (0.0, 0.95), (0.5, 0.5), (0.7, 0.8)]),
    uint8=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_budget_is_exact(
    strategy: str,
    B: int,
    grid: tuple[int, int],
    ratio: float,
    final: float | None,
    schedule: str,
    progress: float,
    bounds: tuple[float, float],
    uint8: bool,
) -> None:
    images = pictures_BCHW(B, 4 * grid[0], seed=B, width=4 * grid[1])
    if uint8:
        images = (128 + 50 * images).clamp(0, 255).to(torch.uint8)
    config = MaskingConfig(
        strategy,
        ratio,
        *bounds,
        ratio_schedule="constant" if final is None else schedule,
        final_mask_ratio=final,
    )
    assert_budget(images, config, 4, progress)


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("patch_size", [14, 16, 32])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_budget_is_exact_at_real_patch_sizes(strategy: str, patch_size: int, dtype: torch.dtype) -> None:
    images = photos_BCHW(3, 5 * patch_size)
    assert_budget(
        images if dtype == torch.uint8 else ((images.float() - 128) / 60).to(dtype), MaskingConfig(strategy), patch_size
    )


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("name", awkward_images())
def test_budget_is_exact_on_awkward_images(strategy: str, name: str) -> None:
    assert_budget(awkward_images()[name], MaskingConfig(strategy, 0.5), 8)
    assert_budget(awkward_images()[name], MaskingConfig(strategy, 0.75), 16)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_target_zero_is_no_masking(strategy: str) -> None:
    images = pictures_BCHW()
    for config in (MaskingConfig("none"), MaskingConfig(strategy, 0.0)):
        masks = choose(images, config)
        assert masks.selection.kept_K.tolist() == list(range(6 * 64))
        assert masks.selection.cu_seqlens_B1.tolist() == list(range(0, 6 * 64 + 1, 64))
        assert masks.visible_BT is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_deterministic_in_the_generator_and_different_between_seeds(strategy: str) -> None:
    config = MaskingConfig(strategy)
    torch.manual_seed(1)
    first = choose(pictures_BCHW(), config, seed=5).selection
    torch.manual_seed(2)  # the global generator has no say
    again, other = (choose(pictures_BCHW(), config, seed).selection for seed in (5, 6))
    assert torch.equal(first.kept_K, again.kept_K)
    assert torch.equal(first.kept_K, other.kept_K) == (strategy in ("none", "attentive"))


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"none", "attentive"}))
def test_images_and_batches_get_different_masks(strategy: str) -> None:
    """The same image six times over: its masks differ; and the generator moves on from batch to batch."""
    images = PatchedImages(pictures_BCHW(1).expand(6, -1, -1, -1).contiguous(), 8)
    generate = generator()
    first, second = (choose_patches(images, MaskingConfig(strategy), generate).selection for _ in range(2))
    assert not torch.equal(first.kept_K, second.kept_K)
    assert kept_BL(first, 6, 64).unique(dim=0).shape[0] > 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "clusters"},
        {"target_mask_ratio": 1.0},
        {"min_mask_ratio": -0.1},
        {"max_mask_ratio": 1.5},
        {"min_mask_ratio": 0.7, "max_mask_ratio": 0.2},
        {"anchor_ratio": 0.0},
        {"similarity": "pixels"},
        {"embedding_mix": 1.1},
        {"strategy": "random", "embedding_mix": 0.5},
        {"ema_decay": 1.0, "strategy": "attentive"},
        {"ratio_schedule": "step", "final_mask_ratio": 0.1},
        {"ratio_schedule": "linear"},
        {"final_mask_ratio": 0.5},
        {"final_mask_ratio": 1.0, "ratio_schedule": "linear"},
    ],
)
def test_config_refuses_nonsense(wrong: dict) -> None:
    with pytest.raises(ValueError, match="|".join(wrong)):
        MaskingConfig(**wrong)


def test_strategies_say_what_they_lack() -> None:
    images = PatchedImages(pictures_BCHW(2), 8)
    with pytest.raises(ValueError, match="attentive needs a copy"):
        choose_patches(images, MaskingConfig("attentive"), generator())
    with pytest.raises(ValueError, match="embedding_mix needs"):
        choose_patches(images, MaskingConfig(embedding_mix=0.5), generator())
