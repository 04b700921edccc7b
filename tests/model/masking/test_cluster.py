"""Similarity to anchors, against float64 loops; the mix with patch embeddings; slices of the batch; flat patches.

B images, L patches, P values of a patch, A anchors, D width
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mask_pictures import awkward_images, choose, generator, kept_BL, photos_BCHW, pictures_BCHW
from torch import Tensor

from model.masking import (
    Guidance,
    MaskingConfig,
    PatchedImages,
    anchor_similarity,
    choose_patches,
    draw_anchors,
    patchify,
    select_patches,
)
from model.masking.cluster import SIMILARITIES, cluster_similarity, embedding_cosines
from model.masking.pgs import pgs_scores
from model.packing import PIXEL_STD
from model.towers import embed_patches


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    """Of two patches, each minus its mean. One without contrast resembles those of its own grey level alone."""
    u_mean, v_mean = u.mean(), v.mean()
    u, v = u - u_mean, v - v_mean
    u_is_flat, v_is_flat = (np.sqrt((w**2).mean()) < 1e-4 for w in (u, v))
    if u_is_flat and v_is_flat:
        return float(abs(u_mean - v_mean) < 5e-3)
    if u_is_flat or v_is_flat:
        return 0.0
    return float(u @ v / np.sqrt((u @ u) * (v @ v)))


def raw_cosine(u: np.ndarray, v: np.ndarray) -> float:
    """Of two patches as they are. Those within half a grey level of the mean colour resemble each other alone."""
    flat = [np.sqrt((w**2).mean()) < 7.5e-3 for w in (u, v)]
    return float(all(flat)) if any(flat) else float(u @ v / np.sqrt((u @ u) * (v @ v)))


def slow_similarity(patches_BLP: Tensor, anchors_BA: Tensor, kind: str = "normalized") -> Tensor:
    cosine_of = raw_cosine if kind == "raw" else cosine
    patches = patches_BLP.double().numpy()
    similarity = np.empty(patches.shape[:2])
    for b, anchors in enumerate(anchors_BA.tolist()):
        for p in range(patches.shape[1]):
            similarity[b, p] = max(1.0 if a == p else cosine_of(patches[b, a], patches[b, p]) for a in anchors)
    return torch.tensor(similarity)


@pytest.mark.parametrize("kind", SIMILARITIES)
@pytest.mark.parametrize("patch_size", [14, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_similarity_equals_float64_loops(patch_size: int, dtype: torch.dtype, kind: str) -> None:
    patches = patchify(pictures_BCHW(3, patch_size * 6), patch_size).to(dtype)
    anchors = draw_anchors(3, 36, 0.1, generator())
    similarity = anchor_similarity(patches, anchors, kind)
    assert similarity.dtype == torch.float32
    assert not similarity.requires_grad
    assert (similarity.gather(1, anchors) == 1).all()  # whatever rounding says
    assert torch.allclose(similarity.double(), slow_similarity(patches, anchors, kind), atol=2e-5)


@pytest.mark.parametrize("kind", SIMILARITIES)
@pytest.mark.parametrize("name", awkward_images())
def test_similarity_on_awkward_images_equals_float64_loops(name: str, kind: str) -> None:
    patches = patchify(awkward_images()[name], 8)
    anchors = draw_anchors(4, 64, 0.03, generator())
    similarity = anchor_similarity(patches, anchors, kind)
    assert torch.allclose(similarity.double(), slow_similarity(patches, anchors, kind), atol=1e-4)
    assert similarity.abs().max() <= 1


def test_similarity_is_computed_in_float32_under_autocast() -> None:
    patches, anchors = torch.randn(4, 49, 192, generator=generator()), draw_anchors(4, 49, 0.1, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = anchor_similarity(patches, anchors), embedding_cosines(patches, anchors)
    assert torch.equal(under[0], anchor_similarity(patches, anchors))
    assert torch.equal(under[1], embedding_cosines(patches, anchors))


def test_one_pixel_one_grey_level_off_is_contrast() -> None:
    """At every patch size the faintest picture has a direction."""
    for patch_size in (14, 16, 32):
        images = torch.full((1, 3, 2 * patch_size, 2 * patch_size), 128, dtype=torch.uint8)
        normalised = PatchedImages(images, patch_size).patches()
        patches = torch.zeros_like(normalised)  # grey in all channels alike, which normalising undoes
        patches[0, 0, 5] = patches[0, 1, 5] = patches[0, 2, 9] = 1 / 255 / 0.27
        assert torch.allclose(
            anchor_similarity(patches, torch.tensor([[0]])), torch.tensor([[1.0, 1, 0, 0]]), atol=0.02
        )


@pytest.mark.parametrize("level", [0.0, 2.64])
def test_rounding_leaves_the_faintest_contrast_alone(level: float) -> None:
    """Just above what counts as flat, on white: fp32 resolves 2e-7 there, a five-hundredth of the contrast."""
    patches = level + 1.2e-4 * torch.randn(2, 20, 768, generator=generator())
    anchors = draw_anchors(2, 20, 0.1, generator())
    assert torch.allclose(anchor_similarity(patches, anchors).double(), slow_similarity(patches, anchors), atol=2e-5)


def test_flat_patches_are_one_cluster_per_colour() -> None:
    patches = torch.zeros(1, 6, 48)
    patches[0, 2:4] = 1.5
    patches[0, 4:] = torch.randn(2, 48, generator=generator())
    assert anchor_similarity(patches, torch.tensor([[0]]))[0].tolist() == [1, 1, 0, 0, 0, 0]
    assert anchor_similarity(patches, torch.tensor([[4]]))[0, :4].tolist() == [0, 0, 0, 0]
    levels = torch.tensor([0.0, 1 / 3, 1.0])[None, :, None].expand(1, 3, 48) * (1 / 255 / 0.27)
    assert anchor_similarity(levels, torch.tensor([[0]]))[0].tolist() == [1, 1, 0]  # a third of a grey level, and one


def test_brightness_counts_raw_and_only_the_pattern_normalised() -> None:
    """A light striped patch, the same stripes in the dark, and a plain light one."""
    stripes = 40 * (torch.arange(64).view(8, 8) % 2).expand(3, 8, 8)
    image = torch.cat([200 + stripes, 20 + stripes, torch.full_like(stripes, 220)], dim=2).to(torch.uint8)
    images, anchors = PatchedImages(image[None], 8), torch.tensor([[0]])
    raw, normalised = (cluster_similarity(images, anchors, kind).similarity_BL[0] for kind in ("raw", "normalized"))
    assert raw[2] > 0.98
    assert raw[1] < -0.8
    assert normalised[1] > 0.98
    assert normalised[2] < 0.5


def test_the_mean_colour_has_no_direction_raw() -> None:
    """The grey that whole numbers of 0 to 255 come nearest to the mean with: what is left of it is rounding."""
    mean = PatchedImages(torch.tensor([123, 117, 104], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 8, 16), 8)
    patches = torch.cat((mean.patches(), torch.randn(1, 2, 192, generator=generator())), dim=1)
    assert anchor_similarity(patches, torch.tensor([[0]]), "raw")[0].tolist() == [1, 1, 0, 0]


def test_permuting_images_or_patches_permutes_similarities() -> None:
    patches, anchors = patchify(pictures_BCHW(), 8), draw_anchors(6, 64, 0.05, generator())
    similarity = anchor_similarity(patches, anchors)
    images = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(anchor_similarity(patches[images], anchors[images]), similarity[images], atol=1e-6)
    places = torch.randperm(64, generator=generator())
    moved = anchor_similarity(patches[:, places], places.argsort()[anchors])
    assert torch.allclose(moved, similarity[:, places], atol=1e-6)


def test_masked_patches_are_the_similar_ones() -> None:
    """An image of two textures: anchors of one texture take most of it with them."""
    left, right = torch.randn(2, 48, generator=generator(1))
    patches = torch.stack([left] * 8 + [right] * 8)[None] + 0.05 * torch.randn(1, 16, 48, generator=generator(3))
    similarity = anchor_similarity(patches, torch.tensor([[2]]))
    kept = kept_BL(select_patches(similarity, 0.5, 0.3, 0.9, generator()), 1, 16)[0]
    assert not kept[:8].any()
    assert kept[8:].all()


@pytest.mark.parametrize("seed", range(3))
def test_the_strategy_is_anchors_then_similarity_then_selection(seed: int) -> None:
    images, generate = pictures_BCHW(5, 48, seed), generator(seed)
    similarity = slow_similarity(patchify(images, 8), draw_anchors(5, 36, 0.1, generate)).float()
    expected = select_patches(similarity, 0.4, 0.2, 0.8, generate)
    masks = choose(images, MaskingConfig("cluster", 0.4, 0.2, 0.8, anchor_ratio=0.1), seed)
    assert torch.equal(masks.selection.cu_seqlens_B1, expected.cu_seqlens_B1)
    assert len(set(masks.selection.kept_K.tolist()) ^ set(expected.kept_K.tolist())) <= 2  # rounding may swap a pair


def test_share_of_patches_of_one_colour() -> None:
    """No channel varies by more than half a grey level, by the bytes."""
    pixels = photos_BCHW(11, 32)
    pixels[:, :, 8:16] = 200  # letterbox
    pixels[0, :, 8:16:4] = 201  # every fourth row a grey level off is one colour
    pixels[1, 1, 9, 3] = 202  # one pixel is no picture
    pixels[2, 1, 9, 3] = 210  # unless it stands out
    pixels[3, 2, 8:16:2] = 202  # every second row two levels off, in blue alone, is not
    pixels[4, :, :8, :8] = torch.tensor([255, 0, 7])[:, None, None]  # any one colour
    patches = patchify(pixels, 8).unflatten(2, (3, 64)).double().numpy()
    expected = (patches.std(axis=3) / 255 / np.array(PIXEL_STD) < 7.5e-3).all(axis=2).mean()
    assert expected == (44 - 4 - 1 + 1) / 176
    assert choose(pixels, MaskingConfig()).flat_share.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_results_do_not_depend_on_the_slices(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, anchors = PatchedImages(photos_BCHW(19, 32), 8), draw_anchors(19, 16, 0.2, generator())
    weight_DP, position_LD = torch.randn(8, 192, generator=generator()), torch.randn(16, 8, generator=generator())

    def results() -> tuple[Tensor, ...]:
        mixed = cluster_similarity(
            images, anchors, "normalized", lambda x: embed_patches(x, weight_DP, position_LD), 0.3
        )
        return *mixed, pgs_scores(images, 0.2, generator())

    expected = results()
    monkeypatch.setattr("model.masking.cluster._CPU_SLICE", size)
    for result, value in zip(results(), expected, strict=True):
        assert torch.allclose(result, value, atol=1e-6)


def test_embedding_mix_is_linear_in_progress() -> None:
    """(1 - w) * cosine of pixels + w * cosine of embeddings, w = embedding_mix * progress, in float64."""
    images = PatchedImages(pictures_BCHW(3, 32), 8)
    patches = images.patches()
    weight_DP, position_LD = torch.randn(8, 192, generator=generator(1)), torch.randn(16, 8, generator=generator(2))
    embeddings = patches.double().numpy() @ weight_DP.double().numpy().T + position_LD.double().numpy()
    anchors = draw_anchors(3, 16, 0.2, generator())
    for mix in (0.0, 0.25, 1.0):
        expected = np.empty((3, 16))
        for b in range(3):
            for p in range(16):
                values = []
                for a in anchors[b].tolist():
                    u, v = embeddings[b, a], embeddings[b, p]
                    embedded = u @ v / np.sqrt((u @ u) * (v @ v))
                    pixels = cosine(patches[b, a].double().numpy(), patches[b, p].double().numpy())
                    values.append(1.0 if a == p else (1 - mix) * pixels + mix * embedded)
                expected[b, p] = max(values)
        result = cluster_similarity(
            images, anchors, "normalized", lambda x: embed_patches(x, weight_DP, position_LD), mix
        )
        assert torch.allclose(result.similarity_BL.double(), torch.tensor(expected), atol=2e-5)

    embed = Guidance(progress=0.5, embed=lambda x: embed_patches(x, weight_DP, position_LD)).embed
    half_way = choose_patches(
        images, MaskingConfig(embedding_mix=0.8, anchor_ratio=0.2), generator(7), Guidance(0.5, embed)
    )
    generate = generator(7)
    similarity = cluster_similarity(images, draw_anchors(3, 16, 0.2, generate), "normalized", embed, 0.4).similarity_BL
    assert torch.equal(half_way.selection.kept_K, select_patches(similarity, 0.5, 0.3, 0.9, generate).kept_K)
