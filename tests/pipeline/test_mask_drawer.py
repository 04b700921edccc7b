"""Masks of a training step: pure in their place in the run, the same in a second pass, and what is reported of them.

B images, L patches of an image, K kept
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from model.clip import CLIP, CLIPOutput
from model.config import config_from_name
from model.loss import contrastive_loss
from model.masking import STRATEGIES, Guidance, MaskingConfig, Masks, PatchedImages, choose_patches
from model.packing import PackedTokens, pack_tokens
from model.towers import embed_patches
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.mask_drawer import MaskDrawer, seed_masks
from pipeline.training.step_report import REPORT_NAMES
from pipeline.training.train_step import Encoded, _means

B, L = 6, 16
LENGTHS = [5, 3, 8, 4, 7, 5]


def rank(number: int = 0) -> Ranks:
    return Ranks(number, number, 4, torch.device("cpu"))


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    return CLIP(dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=50, eot_token_id=49)))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_a_function_of_their_place(strategy: str, clip: CLIP, pixels: Tensor) -> None:
    """Whatever was drawn before, by this drawer or another: a resumed run and a second pass see the same."""
    drawer = MaskDrawer(MaskingConfig(strategy), clip.visual, 8, seed=1, ranks=rank())
    images, first = drawer.draw(pixels, step=7, micro_batch=1, progress=0.5)
    assert images.patch_size == 8
    drawer.draw(pixels, step=8, micro_batch=0, progress=0.6)
    torch.rand(3)
    _, second = drawer.draw(pixels, step=7, micro_batch=1, progress=0.5)
    _, resumed = MaskDrawer(MaskingConfig(strategy), clip.visual, 8, 1, rank()).draw(pixels, 7, 1, 0.5)
    for masks in (second, resumed):
        assert torch.equal(first.selection.kept_K, masks.selection.kept_K)
        assert torch.equal(first.selection.cu_seqlens_B1, masks.selection.cu_seqlens_B1)


@pytest.mark.parametrize("strategy", ["random", "cluster", "pgs", "cluster-reference"])
def test_every_part_of_the_place_counts(strategy: str, clip: CLIP, pixels: Tensor) -> None:
    places = [(1, 7, 1, 0), (2, 7, 1, 0), (1, 8, 1, 0), (1, 7, 0, 0), (1, 7, 1, 1), (7, 1, 1, 0), (0, 1, 1, 7)]
    masks = set()
    for seed, step, micro_batch, number in places:
        drawer = MaskDrawer(MaskingConfig(strategy), clip.visual, 8, seed, rank(number))
        masks.add(tuple(drawer.draw(pixels, step, micro_batch, 0.0)[1].selection.kept_K.tolist()))
    assert len(masks) == len(places)


def test_seeds_of_many_places_are_distinct() -> None:
    seeds, generator = set(), torch.Generator()
    for step in range(30):
        for micro_batch in range(5):
            for number in range(8):
                seed_masks(generator, 1, step, micro_batch, number)
                seeds.add(generator.initial_seed())
    assert len(seeds) == 30 * 5 * 8
    seed_masks(generator, 2**40, 10**9, 0, 0)  # no place is too large
    assert generator.initial_seed() >= 0


def test_progress_moves_ratio_and_embedding_mix(clip: CLIP, pixels: Tensor) -> None:
    config = MaskingConfig("cluster", 0.75, ratio_schedule="linear", final_mask_ratio=0.25, embedding_mix=0.6)
    drawer = MaskDrawer(config, clip.visual, 8, seed=1, ranks=rank())
    weight_DP, position_LD = clip.visual.patch_embedding.weight, clip.visual.positional_embedding[1:]
    for progress in (0.0, 0.5, 1.0):
        images, masks = drawer.draw(pixels, 3, 0, progress)
        assert masks.selection.kept_K.numel() == round((0.25 + 0.5 * progress) * B * L)
        seed_masks(generator := torch.Generator(), 1, 3, 0, 0)
        guidance = Guidance(progress, lambda x: embed_patches(x, weight_DP, position_LD))
        expected = choose_patches(images, config, generator, guidance)
        assert torch.equal(masks.selection.kept_K, expected.selection.kept_K)
    with torch.no_grad():  # the mix looks at the weights of the moment
        clip.visual.patch_embedding.weight.normal_()
    assert not torch.equal(drawer.draw(pixels, 3, 0, 1.0)[1].selection.kept_K, masks.selection.kept_K)


def test_attentive_copy_follows_at_its_own_pace(clip: CLIP, pixels: Tensor) -> None:
    drawer = MaskDrawer(MaskingConfig("attentive", ema_decay=0.75), clip.visual, 8, seed=1, ranks=rank())
    before = clip.visual.proj.detach().clone()
    with torch.no_grad():
        clip.visual.proj.add_(1)
    assert drawer.copy is not None
    assert torch.equal(drawer.copy.visual.proj, before)
    drawer.update_copy()
    assert torch.allclose(drawer.copy.visual.proj, before + 0.25)
    plain = MaskDrawer(MaskingConfig("cluster"), clip.visual, 8, seed=1, ranks=rank())
    plain.update_copy()  # nothing to do
    assert plain.copy is None


def test_attentive_looks_in_the_precision_of_the_model(clip: CLIP, pixels: Tensor) -> None:
    config = MaskingConfig("attentive")
    exact, rounded = (MaskDrawer(config, clip.visual, 8, 1, rank(), precision) for precision in ("fp32", "bf16"))
    images, _ = exact.draw(pixels, 3, 0, 0.5)
    assert exact.copy is not None
    in_fp32, in_bf16 = exact.copy.scores(images), exact.copy.scores(images, torch.bfloat16)
    assert in_fp32.dtype == in_bf16.dtype == torch.float32
    assert not torch.equal(in_fp32, in_bf16)
    torch.testing.assert_close(in_bf16, in_fp32, rtol=0.05, atol=2e-4)
    kept = [set(drawer.draw(pixels, 3, 0, 0.5)[1].selection.kept_K.tolist()) for drawer in (exact, rounded)]
    assert len(kept[0] & kept[1]) > 0.9 * len(kept[0])


def packed_captions(rows: list[int]) -> PackedTokens:
    """Captions of given lengths, the same token ids whatever their neighbours."""
    captions = [torch.cat((torch.arange(1, LENGTHS[row]) + row, torch.tensor([49]))) for row in rows]
    cu_seqlens = torch.tensor([0, *np.cumsum([len(caption) for caption in captions])], dtype=torch.int32)
    return pack_tokens(torch.cat(captions), cu_seqlens, 77)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_caching_in_two_passes_equals_one_pass(checkpointing: bool, clip: CLIP, pixels: Tensor) -> None:
    """Features of all micro-batches first, without gradient; then each again, with the cached gradient of the loss."""
    if checkpointing:
        clip.checkpoint_blocks()
    drawer = MaskDrawer(MaskingConfig(), clip.visual, 8, seed=1, ranks=rank())
    parts = [[0, 1, 2], [3, 4, 5]]

    def features(number: int) -> CLIPOutput:
        images, masks = drawer.draw(pixels[parts[number]], 5, number, 0.0)
        return clip(images.gather(masks.selection.kept_K), masks.selection, packed_captions(parts[number]))

    def loss_of(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(image_features, text_features, scale)

    outputs = [features(0), features(1)]
    loss = loss_of(*(torch.cat(side) for side in list(zip(*outputs, strict=True))[:2]), outputs[0].logit_scale)
    names = [name for name, _ in clip.named_parameters() if name != "logit_scale"]
    expected = torch.autograd.grad(loss, [clip.get_parameter(name) for name in names])

    with torch.no_grad():
        cached = [features(0), features(1)]
    images, texts = (torch.cat(side).requires_grad_() for side in list(zip(*cached, strict=True))[:2])
    image_grads, text_grads = torch.autograd.grad(loss_of(images, texts, cached[0].logit_scale), (images, texts))
    for number, rows in enumerate(parts):
        output = features(number)
        assert torch.equal(output.image_features, cached[number].image_features)  # the same masks
        torch.autograd.backward(output[:2], [image_grads[rows], text_grads[rows]])
    for name, gradient in zip(names, expected, strict=True):
        assert torch.allclose(clip.get_parameter(name).grad, gradient, atol=1e-6), name


@pytest.mark.parametrize("strategy", ["cluster", "random", "cluster-reference"])
def test_what_a_step_reports_of_its_masks(strategy: str, clip: CLIP, pixels: Tensor) -> None:
    pixels[0, :, :16] = 90  # half of one image is plain
    text = packed_captions(list(range(B)))
    batch = Batch(pixels, text.tokens_N, text.layout.cu_seqlens_B1, 8, [], [])
    images, masks = MaskDrawer(MaskingConfig(strategy), clip.visual, 8, 1, rank()).draw(pixels, 0, 0, 0.0)
    kept_K = masks.selection.kept_K
    output = clip(images.gather(kept_K), masks.selection, text, masks.visible_BT)
    report = dict(
        zip(REPORT_NAMES, _means(torch.tensor(2.5), Encoded(batch, images, masks, output)).tolist(), strict=True)
    )
    dropped = 1 - np.bincount(kept_K.numpy() // L, minlength=B) / L
    assert report["loss"] == 2.5
    assert report["mask_ratio"] == pytest.approx(dropped.mean(), abs=1e-6)
    assert report["mask_ratio_std"] == pytest.approx(dropped.std(), abs=1e-6)
    assert report["image_tokens"] == kept_K.numel() + B
    assert report["text_tokens"] == sum(LENGTHS)
    assert report["flat_patches"] == pytest.approx(8 / (B * L)) or strategy != "cluster"
    assert np.isnan(report["mask_threshold"]) == (strategy == "random")
    assert isinstance(masks, Masks)
    assert isinstance(images, PatchedImages)
