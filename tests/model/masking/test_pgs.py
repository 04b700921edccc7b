"""CLIP-PGS: edges by loops, candidates by exact enumeration, transport by a slow iteration, and what it protects.

B images, L patches, A candidates
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from mask_pictures import awkward_images, choose, generator, kept_BL, photos_BCHW, pictures_BCHW, share_tolerance
from torch import Tensor

from model.masking import MaskingConfig, PatchedImages, select_patches
from model.masking.cluster import anchor_cosines
from model.masking.pgs import balance, draw_candidates, edge_strength, pgs_scores
from model.packing import normalize_pixels

SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8


def slow_edges(images_BCHW: Tensor, patch_size: int) -> np.ndarray:
    strengths = []
    for image in images_BCHW.double().numpy():
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        H, W = grey.shape
        magnitude = np.zeros((H, W))
        for y in range(H):
            for x in range(W):
                window = np.array(
                    [
                        [grey[min(max(y + i, 0), H - 1), min(max(x + j, 0), W - 1)] for j in (-1, 0, 1)]
                        for i in (-1, 0, 1)
                    ]
                )
                magnitude[y, x] = np.hypot((window * SOBEL).sum(), (window * SOBEL.T).sum())
        p = patch_size
        mean = [magnitude[y : y + p, x : x + p].mean() for y in range(0, H, p) for x in range(0, W, p)]
        spread = max(mean) - min(mean)
        strengths.append((np.array(mean) - min(mean)) / max(spread, 1e-6))
    return np.stack(strengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edges_equal_sobel_by_loops(dtype: torch.dtype) -> None:
    images = pictures_BCHW(3, 24, width=16).to(dtype)
    edges = edge_strength(images, 8)
    assert edges.dtype == torch.float32
    assert torch.allclose(edges.double(), torch.tensor(slow_edges(images, 8)), atol=1e-4)


@pytest.mark.parametrize("name", ["flat", "two colours", "letterbox", "checkerboard", "one line"])
def test_edges_of_awkward_images(name: str) -> None:
    images = awkward_images(16)[name][:1]
    assert torch.allclose(edge_strength(images, 4).double(), torch.tensor(slow_edges(images, 4)), atol=1e-4)


def test_the_frame_is_no_edge_and_a_border_between_colours_is_one() -> None:
    edges = edge_strength(awkward_images()["two colours"], 8).view(4, 8, 8)
    assert torch.equal(edges[:, :, 3:5], torch.ones(4, 8, 2))
    assert edges.sum() == 4 * 16
    assert edge_strength(awkward_images()["flat"], 8).sum() == 0


def test_candidates_are_drawn_as_enumeration_says() -> None:
    """One after another without replacement, each with a chance in proportion to 1 - edge strength."""
    draws, edges = 40_000, torch.tensor([0.0, 0.5, 0.8, 1.0])
    weights = [1.0, 0.5, 0.2, 1e-3]
    noise = torch.rand(draws, 4, generator=generator())
    candidates = draw_candidates(edges.expand(draws, 4), 0.5, noise)
    assert candidates.shape == (draws, 2)
    for pair in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)):
        expected = sum(
            weights[a] / sum(weights) * weights[b] / (sum(weights) - weights[a]) for a, b in permutations(pair)
        )
        observed = (candidates.sort(dim=1).values == torch.tensor(pair)).all(dim=1).float().mean()
        tolerance = share_tolerance(expected, draws, 6) if expected > 1e-3 else 1e-3
        assert abs(observed - expected) < tolerance, pair


def slow_balance(cosine_AL: np.ndarray, temperature: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Sinkhorn's iteration by loops, to convergence: the plan, and its mean with the similarity."""
    A, L = cosine_AL.shape
    kernel = np.exp((cosine_AL - 1) / temperature)
    left, right = np.ones(A), np.ones(L)
    for _ in range(200):
        for column in range(L):
            right[column] = 1 / L / sum(left[row] * kernel[row, column] for row in range(A))
        for row in range(A):
            left[row] = 1 / A / sum(right[column] * kernel[row, column] for column in range(L))
    plan = left[:, None] * kernel * right
    return plan, (np.maximum(cosine_AL, 0) + plan / plan.max()) / 2


def test_balanced_similarities_equal_a_slow_iteration() -> None:
    patches = PatchedImages(pictures_BCHW(4, 40), 8).patches()
    cosine = anchor_cosines(patches, torch.tensor([[0, 7, 19]]).expand(4, 3))
    balanced = balance(cosine)
    assert 0 <= balanced.min()
    assert balanced.max() <= 1
    for image, result in zip(cosine.double().numpy(), balanced.double().numpy(), strict=True):
        plan, expected = slow_balance(image)
        assert np.abs(plan.sum(axis=0) - 1 / 25).max() < 1e-6  # the slow one has converged
        assert np.abs(result - expected).max() < 0.01
        ours = 2 * result - np.maximum(image, 0)
        assert np.abs(ours.sum(axis=1) / ours.sum() * 3 - 1).max() < 1e-4
        assert np.abs(ours.sum(axis=0) / ours.sum() * 25 - 1).max() < 0.01
        assert ours.max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_balance_of_equal_similarities_stays_equal(value: float) -> None:
    balanced = balance(torch.full((2, 3, 5), value))
    assert torch.allclose(balanced, torch.full((2, 3, 5), (max(value, 0) + 1) / 2))


def test_a_single_candidate_leaves_nothing_to_balance() -> None:
    """Every patch must send its whole mass to it: the plan is flat, and the order that of the similarity."""
    cosine = torch.linspace(-0.9, 1, 20).view(1, 1, 20)
    assert torch.allclose(balance(cosine), (cosine.clamp_min(0) + 1) / 2, atol=1e-5)


def test_scores_are_similarity_minus_edges() -> None:
    images, generate = PatchedImages(photos_BCHW(5, 40), 8), generator(2)
    noise = torch.rand(5, 25, generator=generate)
    edges = edge_strength(normalize_pixels(images.images_BCHW), 8)
    candidates = draw_candidates(edges, 0.12, noise)
    scores = pgs_scores(images, 0.12, generator(2))
    for b in range(5):
        cosine = anchor_cosines(images.patches(slice(b, b + 1)), candidates[b : b + 1])[0].double().numpy()
        similarity = slow_balance(cosine)[1].max(axis=0)
        similarity[candidates[b].numpy()] = 1
        assert np.abs(scores[b].numpy() - (similarity - edges[b].numpy())).max() < 0.02
    selection = select_patches(scores, 0.5, 0.3, 0.9, generate)
    chosen = choose(images.images_BCHW, MaskingConfig("pgs", anchor_ratio=0.12), seed=2)
    assert torch.equal(selection.kept_K, chosen.selection.kept_K)


def test_permuting_images_permutes_scores() -> None:
    """But for the noise that draws the candidates, which goes by place in the batch."""
    images, order = pictures_BCHW(), torch.tensor([3, 0, 5, 1, 4, 2])
    edges, noise = edge_strength(images, 8), torch.rand(6, 64, generator=generator())
    assert torch.allclose(edge_strength(images[order], 8), edges[order], atol=1e-6)
    candidates = draw_candidates(edges, 0.1, noise)
    assert torch.equal(draw_candidates(edges[order], 0.1, noise[order]).sort().values, candidates[order].sort().values)


def test_an_object_keeps_more_than_its_share() -> None:
    """A textured square on a plain background; random masks would keep half of it."""
    B = 60
    images = torch.full((B, 3, 64, 64), 0.3) + 0.01 * torch.randn(B, 3, 64, 64, generator=generator(1))
    images[:, :, 16:40, 24:48] = torch.randn(B, 3, 24, 24, generator=generator(2))
    kept = kept_BL(choose(images, MaskingConfig("pgs")).selection, B, 64).view(B, 8, 8)
    assert kept[:, 2:5, 3:6].float().mean() > 0.95
    assert kept.float().mean() == 0.5
