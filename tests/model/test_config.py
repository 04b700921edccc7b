"""Named models have the sizes of open_clip's of the same name."""

from __future__ import annotations

import pytest
import torch

from model.clip import CLIP
from model.config import CONFIGS, CLIPConfig, config_from_name


@pytest.mark.parametrize(
    ("name", "millions"),
    # parameters that open_clip's model profile lists
    [("ViT-B-32", 151.28), ("ViT-B-16", 149.62), ("ViT-L-14", 427.62), ("ViT-H-14", 986.11)],
)
def test_parameters_are_as_many_as_open_clips(name: str, millions: float) -> None:
    with torch.device("meta"):
        clip = CLIP.from_name(name)
    assert round(sum(parameter.numel() for parameter in clip.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_a_round_trip(name: str) -> None:
    assert CLIPConfig.from_dict(config_from_name(name).to_dict()) == config_from_name(name)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'ViT-B-16'"):
        CLIP.from_name("VIT-B/16")
