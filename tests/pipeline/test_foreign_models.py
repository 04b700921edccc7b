"""Models of other libraries, by way of our exports: the same features, or one line on what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import save_run, synthetic_merges

from formats.errors import UserError
from pipeline.data.tokenizer import load_tokenizer
from pipeline.export import main as export
from pipeline.inference import load_any_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_merges(tmp_path_factory.mktemp("merges") / "merges.gz")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, merges: Path) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "run", load_tokenizer(str(merges), 77))


def exported(run: Path, library: str, output: Path) -> Path:
    assert export([str(run), "--format", library, "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_an_export_gives_the_features_of_its_run(library: str, run: Path, merges: Path, tmp_path: Path) -> None:
    folder = exported(run, library, tmp_path / "model")
    ours = load_any_model(str(run), CPU)
    theirs = load_any_model(str(folder), CPU, str(merges) if library == "open_clip" else None)
    assert (theirs.name, theirs.step, theirs.samples_seen, theirs.image_size) == ("model", None, None, 32)
    images_BCHW = torch.rand(3, 3, 32, 32)
    captions = ["a red square", "two Cats &amp; a dog"]
    with torch.inference_mode():
        for model in (ours, theirs):
            assert model.tokenizer.encode_batch(captions).equal(ours.tokenizer.encode_batch(captions))
        tokens = ours.tokenizer.encode_batch(captions)
        assert theirs.clip.encode_image(images_BCHW).equal(ours.clip.encode_image(images_BCHW))
        assert theirs.clip.encode_text(tokens).equal(ours.clip.encode_text(tokens))


def change(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    fields = content
    for key in keys[:-1]:
        fields = fields[key]
    fields[keys[-1]] = value
    file.write_text(json.dumps(content))


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("library", "damage", "message"),
    [
        (
            "open_clip",
            lambda f: change(f / "open_clip_config.json", "model_cfg", "vision_cfg", "width", value=64),
            r"is not the model that its configuration describes: \S+ is \(",
        ),
        (
            "open_clip",
            lambda f: change(f / "open_clip_config.json", "model_cfg", "vision_cfg", "layers", value=[3, 4]),
            "no vision transformer",
        ),
        ("open_clip", lambda f: (f / "open_clip_config.json").unlink(), "no run or checkpoint|no complete checkpoint"),
        (
            "transformers",
            lambda f: change(f / "config.json", "model_type", value="siglip"),
            "model_type is siglip, not clip",
        ),
        (
            "transformers",
            lambda f: (f / "merges.txt").write_text("#version: 0.2\na b\n"),
            "ids are not in the order of CLIP's byte pairs",
        ),
        (
            "transformers",
            lambda f: ((f / "merges.txt").write_text("#version: 0.2\na b\n"), (f / "vocab.json").unlink()),
            "embedding of 49,408 tokens and the tokenizer has 515",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    library: str, damage: Damage, message: str, run: Path, merges: Path, tmp_path: Path
) -> None:
    folder = exported(run, library, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_any_model(str(folder), CPU, str(merges) if library == "open_clip" else None)
    assert "\n" not in str(caught.value)


def test_a_bare_file_needs_a_name(run: Path, merges: Path, tmp_path: Path) -> None:
    folder = exported(run, "open_clip", tmp_path / "model")
    file = (folder / "open_clip_model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="say which it is with --model"):
        load_any_model(str(file), CPU, str(merges))
    assert load_any_model(str(file), CPU, str(merges), "ViT-test-8").name == "ViT-test-8"
    with pytest.raises(UserError, match="is not the ViT-nano-8"):
        load_any_model(str(file), CPU, str(merges), "ViT-nano-8")
