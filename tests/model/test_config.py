"""Named models have the sizes of open_clip's of the same name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.clip import CLIP
from model.config import CONFIGS, CLIPConfig, config_from_name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    # parameters that open_clip's model profile lists
    [("ViT-B-32", 151.28), ("ViT-B-16", 149.62), ("ViT-L-14", 427.62), ("ViT-H-14", 986.11)],
)
def test_parameters_are_as_many_as_open_clips(name: str, millions: float) -> None:
    with torch.device("meta"):
        clip = CLIP.from_name(name)
    assert round(sum(parameter.numel() for parameter in clip.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", [*CONFIGS, "ViT-B-16-quickgelu"])
def test_configurations_survive_a_round_trip(name: str) -> None:
    assert CLIPConfig.from_dict(config_from_name(name).to_dict()) == config_from_name(name)


def test_every_size_comes_with_every_patch() -> None:
    for size, width in {"S": 384, "B": 768, "L": 1024, "H": 1280}.items():
        for patch_size in (14, 16, 32):
            vision = config_from_name(f"ViT-{size}-{patch_size}").vision
            assert (vision.width, vision.patch_size, vision.num_patches) == (
                width,
                patch_size,
                (224 // patch_size) ** 2,
            )


def test_quickgelu_is_the_same_model_with_another_activation() -> None:
    plain, quick = config_from_name("ViT-L-14"), config_from_name("ViT-L-14-quickgelu")
    assert (plain.activation, quick.activation) == ("gelu", "quick_gelu")
    assert replace(quick.with_activation("gelu"), name="ViT-L-14") == plain


def test_a_model_of_before_there_were_variants_still_loads() -> None:
    fields = config_from_name("ViT-B-32").to_dict()
    del fields["vision"]["activation"], fields["text"]["activation"], fields["vision"]["pool"]
    del fields["text"]["attention"], fields["text"]["pool"]
    assert CLIPConfig.from_dict(fields) == config_from_name("ViT-B-32")


def test_unknown_variants_are_refused() -> None:
    config = config_from_name("ViT-test-8")
    with pytest.raises(ValueError, match="unknown pool 'max'; known: class, average, attention"):
        replace(config.vision, pool="max")
    with pytest.raises(ValueError, match="unknown text attention 'full'; known: causal, bidirectional"):
        replace(config.text, attention="full")
    with pytest.raises(ValueError, match="text pool mean needs bidirectional text attention"):
        replace(config.text, pool="mean")
    with pytest.raises(ValueError, match="unknown activation 'relu'; known: gelu, quick_gelu"):
        config.with_activation("relu")
    with pytest.raises(ValueError, match="towers differ: quick_gelu for images, gelu for text"):
        replace(config, vision=replace(config.vision, activation="quick_gelu"))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'ViT-B-16'"):
        config_from_name("vit-b-16")
    with pytest.raises(ValueError, match="did you mean 'ViT-B-16'"):
        CLIP.from_name("VIT-B/16")
    with pytest.raises(ValueError, match="did you mean 'ViT-B-16-quickgelu'"):
        CLIP.from_name("VIT-B/16-quickgelu")
