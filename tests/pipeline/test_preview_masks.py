"""The masks and clusters of a preview are those of training, by independent means."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from preview_material import PATCH, SIZE, sheet_of, stand_in_checkpoint, write_pictures
from torch import Tensor

from model.masking import Guidance, MaskingConfig, PatchedImages, choose_patches
from model.packing import normalize_pixels
from pipeline.reporting.masks import setting as preview_setting
from pipeline.reporting.masks.anatomy import Anatomy, dissect
from pipeline.training.mask_drawer import seed_masks

WITHOUT_MODEL = ["none", "random", "block", "grid", "cluster", "pgs", "cluster-reference"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def images_BCSS(folder: Path) -> Tensor:
    pixels = [np.array(Image.open(folder / f"{number}.png")) for number in range(3)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def busy_BCSS() -> Tensor:
    """Coarse noise under fine noise: no flat patches, and no two similarities alike."""
    generator = torch.Generator().manual_seed(1)
    coarse_BCSS = torch.nn.functional.interpolate(torch.rand(3, 3, 5, 5, generator=generator), SIZE, mode="bicubic")
    fine_BCSS = torch.rand(3, 3, SIZE, SIZE, generator=generator)
    return (200 * coarse_BCSS + 50 * fine_BCSS).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    return stand_in_checkpoint(monkeypatch)


def dropped_by_training(images_BCSS: Tensor, masking: MaskingConfig, guidance: Guidance | None = None) -> Tensor:
    """What the first step of a run with seed 3 drops, bool [B, L]."""
    generator = torch.Generator()
    seed_masks(generator, seed=3, step=0, micro_batch=0, rank=0)
    kept = choose_patches(PatchedImages(images_BCSS, PATCH), masking, generator, guidance).selection.kept_K.tolist()
    return torch.tensor([patch not in kept for patch in range(3 * 64)]).view(3, 64)


def changed_patches(before: Image.Image, after: Image.Image) -> Tensor:
    """Which of 8 x 8 patches of two pictures differ by more than a few grey levels, bool [64]."""
    difference = np.abs(np.asarray(before, dtype=float) - np.asarray(after, dtype=float)).mean(axis=2)
    side = difference.shape[0] // 8
    return torch.from_numpy(difference.reshape(8, side, 8, side).mean(axis=(1, 3)).flatten() > 8)


@pytest.mark.parametrize("strategy", WITHOUT_MODEL)
def test_grey_patches_are_those_that_training_drops(strategy: str, folder: Path, images_BCSS: Tensor) -> None:
    dropped_BL = dropped_by_training(images_BCSS, MaskingConfig(strategy))
    sheet = sheet_of(folder, ["random", strategy] if strategy != "random" else ["random"])
    for row, dropped_L in zip(sheet.rows, dropped_BL, strict=True):
        assert torch.equal(changed_patches(row.cells[0].picture, row.cells[-1].picture), dropped_L)
        assert row.cells[-1].note == f"{100 * dropped_L.float().mean():.1f} % dropped"


def test_strategies_that_look_through_a_model(folder: Path, images_BCSS: Tensor, checkpoint: str) -> None:
    visual = preview_setting.load_for_inference(checkpoint, torch.device("cpu")).clip.visual
    copy = preview_setting.class_attention(visual, PatchedImages(images_BCSS, PATCH))
    dropped_BL = dropped_by_training(
        images_BCSS, MaskingConfig("attentive"), Guidance(class_attention=lambda images: copy)
    )
    sheet = sheet_of(folder, ["attentive"], checkpoint=checkpoint)
    assert [cell.label for cell in sheet.rows[0].cells] == ["original", "attentive"]
    for row, dropped_L, attention_L in zip(sheet.rows, dropped_BL, copy, strict=True):
        drawn_L = changed_patches(row.cells[0].picture, row.cells[1].picture)
        assert torch.equal(drawn_L, dropped_L)
        assert attention_L[drawn_L].max() <= attention_L[~drawn_L].min()


def assert_threshold_explains(anatomy: Anatomy) -> None:
    assert anatomy.clusters
    score_BL = anatomy.clusters.score_BL
    assert math.isfinite(anatomy.threshold)
    assert bool(anatomy.dropped_BL[score_BL > anatomy.threshold + 1e-5].all())
    assert not bool(anatomy.dropped_BL[score_BL < anatomy.threshold - 1e-5].any())
    assert (score_BL - anatomy.threshold).abs().gt(1e-5).float().mean() > 0.95


# within such bounds nothing but the threshold decides
WIDE = MaskingConfig(anchor_ratio=0.1, min_mask_ratio=0.0, max_mask_ratio=0.99)


@pytest.mark.parametrize("strategy", ["cluster", "pgs"])
def test_clusters_are_those_by_which_the_mask_was_made(strategy: str, busy_BCSS: Tensor) -> None:
    assert_threshold_explains(dissect(PatchedImages(busy_BCSS, PATCH), replace(WIDE, strategy=strategy), seed=5))


def test_clusters_by_patch_embeddings(busy_BCSS: Tensor) -> None:
    weight_DP = torch.randn(16, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(progress=1.0, embed=lambda patches_BLP: patches_BLP @ weight_DP.T)
    mixed = dissect(PatchedImages(busy_BCSS, PATCH), replace(WIDE, embedding_mix=1.0), 0, guidance)
    assert_threshold_explains(mixed)
    assert mixed.clusters
    for image, anchors_A, similarity_L in zip(
        busy_BCSS, mixed.clusters.anchors_BA, mixed.clusters.similarity_BL, strict=True
    ):
        embedded_LD = PatchedImages(image[None], PATCH).patches()[0] @ weight_DP.T
        cosines = [torch.cosine_similarity(embedded_LD[[anchor]], embedded_LD).numpy() for anchor in anchors_A.tolist()]
        np.testing.assert_allclose(similarity_L.numpy(), np.max(cosines, axis=0), atol=1e-5)


def test_each_patch_is_in_the_cluster_of_the_anchor_it_correlates_with_most(busy_BCSS: Tensor) -> None:
    clusters = dissect(PatchedImages(busy_BCSS, PATCH), WIDE, seed=0).clusters
    assert clusters
    pixels = normalize_pixels(busy_BCSS)[0].numpy()
    patches = [pixels[:, y : y + 8, x : x + 8].flatten() for y in range(0, SIZE, 8) for x in range(0, SIZE, 8)]
    anchors = [patches[anchor] for anchor in clusters.anchors_BA[0].tolist()]
    for number, patch in enumerate(patches):
        correlations = [np.corrcoef(anchor, patch)[0, 1] for anchor in anchors]
        assert clusters.nearest_BL[0, number] == int(np.argmax(correlations))
        assert clusters.similarity_BL[0, number].item() == pytest.approx(max(correlations), abs=1e-5)
