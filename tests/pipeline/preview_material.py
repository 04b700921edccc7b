"""Pictures, an untrained model and a sheet for mask previews."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.clip import CLIP
from model.config import config_from_name
from model.masking import MaskingConfig
from pipeline.data.image_transform import Preprocessing
from pipeline.image_sources import load_image, read_images
from pipeline.inference import InferenceModel
from pipeline.recipe_files import load_recipe
from pipeline.reporting.masks import setting as preview_setting
from pipeline.reporting.masks.setting import make_setting
from pipeline.reporting.masks.sheet import Sheet, make_sheet

SIZE, PATCH = 64, 8


def write_pictures(directory: Path) -> Path:
    """Three pictures: under a flat sky noise, stripes, a disc."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    disc = np.where(((x - 40) ** 2 + (y - 44) ** 2 < 150)[..., None], (220, 40, 30), (60, 140, 60))
    pictures = [rng.integers(0, 256, (SIZE, SIZE, 3)), np.stack([x * 37 % 200, y * 3, x + y], -1), disc]
    for number, pixels in enumerate(pictures):
        pixels[: SIZE // 2] = (120, 160, 230 - 40 * number)
        Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{number}.png")
    return directory


def stand_in_checkpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    """An untrained model that stands for a checkpoint of 64 x 64 images in patches of 8."""
    torch.manual_seed(0)
    config = config_from_name("ViT-nano-8")
    model = InferenceModel(
        clip=CLIP(replace(config, text=replace(config.text, vocab_size=16, eot_token_id=15))).eval(),
        tokenizer=None,  # type: ignore[arg-type]
        preprocessing=Preprocessing(SIZE),
        name="ViT-nano-8",
        checkpoint="runs/test",
        step=7,
        samples_seen=700,
        weights_sha256="ab" * 32,
        masking=MaskingConfig(),
    )
    monkeypatch.setattr(preview_setting, "load_for_inference", lambda path, device: model)
    return "runs/test"


def sheet_of(folder: Path, strategies: list[str], show: str = "clusters", checkpoint: str | None = None) -> Sheet:
    setting = make_setting(load_recipe("base"), strategies, checkpoint, PATCH, SIZE, seed=3, progress=1.0)
    samples = read_images(folder)
    return make_sheet(setting, samples, torch.stack([load_image(sample.image, SIZE) for sample in samples]), show)
