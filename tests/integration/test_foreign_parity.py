"""Models of others as their libraries save them: the same pixels, weights and token ids here as there.

Needs the environment of `make peers`, or another one named by PEERS_PYTHON.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import jpeg_bytes
from peers.cases import PECULIAR_CAPTIONS, small_config, untrained_model
from peers.client import Peer
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.tokens.clip_merges import ClipBytePairs as TrainedPairs
from formats.errors import UserError
from model.config import CLIPConfig, config_from_name
from pipeline.data.captions import Tokenizer, load_tokenizer, tokenizer_from_bytes
from pipeline.data.image_transform import Preprocessing, decode_image
from pipeline.export import FORMATS, export, random_examples
from pipeline.foreign import open_clip_folder, transformers_folder
from pipeline.foreign.dinov2 import is_dinov2, read_dinov2
from pipeline.inference import InferenceModel, load_any_model

SIZE = 32
SHAPES = [(40, 32), (97, 61), (61, 97), (33, 32), (32, 35), (20, 24), (300, 21), (200, 90)]
HALF = [0.5, 0.5, 0.5]
OPEN_CLIP = [
    {},
    {"resize_mode": "squash"},
    {"resize_mode": "longest"},
    {"resize_mode": "longest", "fill_color": 200},
    {"interpolation": "bilinear", "resize_mode": None},
    {"interpolation": "random"},
    {"mean": HALF, "std": [0.2, 0.3, 0.4]},
    {"mean": 0.4, "std": 0.25, "resize_mode": "squash", "interpolation": "bilinear"},
]
CROPPED = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
TRANSFORMERS = [
    CROPPED,
    {"size": SIZE, "crop_size": SIZE, "image_mean": HALF, "image_std": HALF},
    {"size": {"shortest_edge": 40}, "crop_size": SIZE, "feature_extractor_type": "CLIPFeatureExtractor"},
    {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False, "resample": 2},
    {"size": {"height": 41, "width": 41}, "crop_size": SIZE},
    CROPPED | {"do_normalize": False},
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of odd shapes, whose names sort in the order of SHAPES."""
    folder = tmp_path_factory.mktemp("images")
    for index, (width, height) in enumerate(SHAPES):
        (folder / f"{index}.jpg").write_bytes(jpeg_bytes(index, width, height))
    return folder


def assert_same_pixels(preprocessings: list[Preprocessing], theirs: dict[str, Tensor], images: Path) -> None:
    pictures = [decode_image(path.read_bytes()) for path in sorted(images.iterdir())]
    for index, preprocessing in enumerate(preprocessings):
        ours = preprocessing.normalize(torch.stack([preprocessing(picture) for picture in pictures]))
        # in grey levels; versions of Pillow round a few pixels in a hundred differently
        difference = (ours - theirs[str(index)]).abs() * 255 * torch.tensor(preprocessing.std).view(3, 1, 1)
        assert difference.max() < 1.001, f"setting {index}: {preprocessing}"
        assert difference.mean() < 0.05, f"setting {index}: {preprocessing}"


def test_open_clips_preprocessing(peer: Peer, images: Path, tmp_path: Path) -> None:
    full = [{"size": SIZE} | {name: value for name, value in fields.items() if value} for fields in OPEN_CLIP]
    peer("open_clip_preprocessed", json.dumps(full), images, tmp_path / "theirs")
    ours = [open_clip_folder.read_preprocessing({"preprocess_cfg": fields}, SIZE) for fields in OPEN_CLIP]
    assert len(set(ours)) == len(ours) - 1  # "random" is bicubic
    assert_same_pixels(ours, load_file(tmp_path / "theirs"), images)


def test_transformers_preprocessing(peer: Peer, images: Path, tmp_path: Path) -> None:
    peer("transformers_preprocessed", json.dumps(TRANSFORMERS), images, tmp_path / "theirs")
    ours = []
    for fields in TRANSFORMERS:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
        ours.append(transformers_folder.read_preprocessing(tmp_path, SIZE))
    assert_same_pixels(ours, load_file(tmp_path / "theirs"), images)


@pytest.fixture(scope="module")
def byte_pairs() -> Tokenizer:
    """Trained on a few captions, as `data-prep tokenizer --model-type byte-pairs` does."""
    captions = [f"a {colour} {thing} on the café's roof" for colour in ("red", "blue") for thing in ("dog", "car")]
    return tokenizer_from_bytes(TrainedPairs.train(captions, 600).to_file(), 40, "trained")


def exported(library: str, folder: Path, tokenizer: Tokenizer, config: CLIPConfig | None = None) -> InferenceModel:
    """A small model in a library's folder, and the model."""
    config, encoder = config or small_config(), tokenizer.encoder
    text = replace(config.text, vocab_size=encoder.vocab_size, eot_token_id=encoder.end_token_id)
    model = untrained_model(replace(config, text=text), tokenizer)
    export(model, FORMATS[library], folder, random_examples(model))
    return model


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_trained_byte_pairs_go_along_with_an_export(
    library: str, peer: Peer, byte_pairs: Tokenizer, tmp_path: Path
) -> None:
    model = exported(library, tmp_path / "export", byte_pairs)
    captions = [text for text in PECULIAR_CAPTIONS if "&" not in text and "“" not in text]
    (tmp_path / "captions").write_text(json.dumps(captions))
    if library == "open_clip":
        peer("open_clip_tokens", tmp_path / "captions", tmp_path / "ids", f"local-dir:{tmp_path / 'export'}")
    else:
        (tmp_path / "image.jpg").write_bytes(jpeg_bytes(0))
        peer(
            "transformers_inputs", tmp_path / "export", tmp_path / "captions", tmp_path / "image.jpg", tmp_path / "ids"
        )
    for theirs, text in zip(load_file(tmp_path / "ids")["tokens"].tolist(), captions, strict=True):
        ours = byte_pairs.encode(text)
        assert theirs == ours + [ours[-1]] * (40 - len(ours)), text  # padded with end tokens
    again = load_any_model(str(tmp_path / "export"), torch.device("cpu"))
    assert again.tokenizer.encode_batch(captions).equal(byte_pairs.encode_batch(captions))
    assert_same_features(again, model)


def assert_same_features(found: InferenceModel, expected: InferenceModel) -> None:
    examples = random_examples(expected)
    with torch.inference_mode():
        for encode, inputs in (("encode_image", examples.images_BCHW), ("encode_text", examples.tokens_BT)):
            assert getattr(found.clip, encode)(inputs).equal(getattr(expected.clip, encode)(inputs))


def test_openais_archive_is_read_without_its_code(peer: Peer, tmp_path: Path) -> None:
    """Its shapes and its three numbers say what it is; no --model, no configuration."""
    tokenizer = load_tokenizer(peer("merges"), 40)
    large = config_from_name("ViT-B-32-quickgelu")  # of OpenAI's widths, and hardly deep
    vision, text = replace(large.vision, layers=1), replace(large.text, layers=2, context_length=40)
    model = exported("open_clip", tmp_path / "export", tokenizer, replace(large, vision=vision, text=text))
    peer("open_clip_scripted", tmp_path / "export", tmp_path / "openai.pt")
    found = load_any_model(str(tmp_path / "openai.pt"), torch.device("cpu"), peer("merges"))
    assert found.clip.config == replace(model.clip.config, name="openai")
    assert_same_features(found, model)


def test_a_folder_that_transformers_saved_again(peer: Peer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(peer("merges"), 40)
    model = exported("transformers", tmp_path / "export", tokenizer)
    peer("transformers_resaved", tmp_path / "export", tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"model.safetensors.index.json", "tokenizer.json", "processor_config.json"} <= names
    assert not {"model.safetensors", "merges.txt", "preprocessor_config.json"} & names
    assert "num_channels" not in (tmp_path / "again" / "config.json").read_text()
    found = load_any_model(str(tmp_path / "again"), torch.device("cpu"))
    assert found.tokenizer.encode_batch(PECULIAR_CAPTIONS).equal(tokenizer.encode_batch(PECULIAR_CAPTIONS))
    assert found.preprocessing == Preprocessing(84, floor_offsets=True, resized=84)
    assert_same_features(found, model)


def test_dinov2(peer: Peer, tmp_path: Path) -> None:
    images_BCHW = torch.randn(3, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    save_file({"images": images_BCHW}, tmp_path / "images")
    folder = tmp_path / "dinov2"
    peer("dinov2_random", folder, tmp_path / "images", tmp_path / "theirs")
    assert is_dinov2(folder)
    model = read_dinov2(folder, torch.device("cpu"))
    assert (model.preprocessing.size, model.preprocessing.resized, model.width) == (42, 48, 24)
    theirs_BD = load_file(tmp_path / "theirs")["image_features"]
    torch.testing.assert_close(model.encode_image(images_BCHW), theirs_BD, atol=1e-5, rtol=1e-5)
    # names of the files that are published
    old = {re.sub(r"\.q_proj", ".attention.query", name): value for name, value in model.weights.items()}
    save_file(old, folder / "model.safetensors")
    torch.testing.assert_close(read_dinov2(folder, torch.device("cpu")).encode_image(images_BCHW), theirs_BD)
    del old["layernorm.bias"]
    save_file(old, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layernorm\.bias is missing"):
        read_dinov2(folder, torch.device("cpu"))
