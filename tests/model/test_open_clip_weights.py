"""Renaming to open_clip and transformers loses nothing; what the values mean is checked against the libraries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.clip import CLIP
from model.masking import patchify
from model.open_clip_weights import from_open_clip, to_open_clip
from model.transformers_weights import from_transformers, to_transformers


def random_weights(name: str = "ViT-test-8") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    template = CLIP.from_name(name).state_dict()
    return {name: torch.randn(value.shape, generator=generator) for name, value in template.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ViT-test-8", "ViT-tiny-16"])
def test_there_and_back(name: str) -> None:
    weights = random_weights(name)
    assert_equal(from_open_clip(to_open_clip(weights)), weights)
    assert_equal(from_transformers(to_transformers(weights), weights), weights)


def test_the_bias_of_the_sigmoid_loss_is_a_scalar_of_open_clip() -> None:
    weights = random_weights() | {"logit_bias": torch.tensor([-9.5])}
    exported = to_open_clip(weights)
    assert exported["logit_bias"].shape == ()
    assert_equal(from_open_clip(exported), weights)


def test_names_and_shapes_of_open_clip() -> None:
    weights = random_weights()
    exported = to_open_clip(weights)
    assert exported["visual.conv1.weight"].shape == (32, 3, 8, 8)
    assert exported["logit_scale"].shape == ()
    assert (
        exported["transformer.resblocks.1.attn.in_proj_weight"]
        is weights["text.transformer.resblocks.1.attn.in_proj_weight"]
    )
    assert exported["visual.proj"] is weights["visual.proj"]
    assert not any(name.startswith("text.") for name in exported)
    assert len(exported) == len(weights)


@pytest.mark.parametrize(
    ("convolution", "rename"),
    [
        ("visual.conv1.weight", to_open_clip),
        ("vision_model.embeddings.patch_embedding.weight", to_transformers),
    ],
)
def test_the_patch_embedding_is_their_convolution(
    convolution: str, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    weights = random_weights()
    images_BCHW = torch.randn(2, 3, 32, 32)
    expected_BLD = F.conv2d(images_BCHW, rename(weights)[convolution], stride=8).flatten(2).transpose(1, 2)
    ours_BLD = patchify(images_BCHW, 8) @ weights["visual.patch_embedding.weight"].T
    torch.testing.assert_close(ours_BLD, expected_BLD, rtol=1e-4, atol=1e-4)


def test_query_key_value_are_split_in_this_order() -> None:
    weights = random_weights()
    exported = to_transformers(weights)
    parts = [exported[f"text_model.encoder.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"]
    expected = weights["text.transformer.resblocks.1.attn.in_proj_bias"].view(3, 32)
    assert torch.equal(torch.stack(parts), expected)


@pytest.mark.parametrize("name", ["text.proj.weight", "text_decoder.text_projection"])
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not a weight of an open_clip CLIP"):
        from_open_clip(to_open_clip(random_weights()) | {name: torch.zeros(1)})


def test_another_image_tower_does_not_load() -> None:
    weights = from_open_clip(to_open_clip(random_weights()) | {"visual.attn_pool.query": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"visual\.attn_pool\.query"):
        CLIP.from_name("ViT-test-8").load_state_dict(weights)


def test_weights_without_a_patch_embedding_are_refused() -> None:
    exported = to_open_clip(random_weights())
    del exported["visual.conv1.weight"]
    with pytest.raises(ValueError, match=r"no visual\.conv1\.weight"):
        from_open_clip(exported)


def test_another_depth_is_refused_by_transformers_names() -> None:
    weights = random_weights()
    exported = to_transformers(weights)
    with pytest.raises(ValueError, match="surplus is not a weight"):
        from_transformers(exported | {"surplus": torch.zeros(1)}, weights)
    del exported["text_model.encoder.layers.0.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"text_model\.encoder\.layers\.0\.mlp\.fc1\.bias is missing"):
        from_transformers(exported, weights)
