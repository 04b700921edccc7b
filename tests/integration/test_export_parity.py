"""Exports are loaded by open_clip and transformers, and give the features and token ids that they give here.

Needs the environment of `make peers`, or another one named by PEERS_PYTHON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, jpeg_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.clip import CLIP
from model.config import CLIPConfig, config_from_name
from model.masking import MaskingConfig
from model.open_clip_weights import from_open_clip
from model.patches import normalize_pixels
from pipeline.export import export
from pipeline.export_formats import FORMATS, open_clip_config
from pipeline.image_transform import decode_image, resize_center_crop
from pipeline.inference import InferenceModel
from pipeline.parity import random_examples
from pipeline.tokenizer import Tokenizer, load_tokenizer

Peer = Callable[..., str]

TOLERANCE = 1e-5
CAPTIONS = [
    "a dog",
    "Two CATS, one sofa; three o'clock!",
    "the photographer's wife doesn't know we've 12,345 of them (50% off) #sale @home",
    "",
    "a naïve café in Zürich — Ελλάδα, Россия, 日本の猫 한국어 العربية",
    "smile 😀👍🏽 👩‍👩‍👧 🇫🇷",
    "fish &amp; chips &amp;amp; &lt;b&gt;peas&lt;/b&gt; &quot;now&quot; it&#39;s",
    "“curly” ‘quotes’ and the dog’s bone…",
    "cafe\u0301 decomposed, tabs\tand\nlines \u00a0 spaces",
    "a_b-c/d\\e|f~g`h^i=j+k*l",
    "word " * 100,
]


@pytest.fixture(scope="session")
def peer() -> Peer:
    """Run a command of tests/peers/peer.py in the other environment."""
    named = os.environ.get("PEERS_PYTHON")
    python = Path(named) if named else ROOT / ".peers" / "bin" / "python"
    if not named and not python.exists():
        pytest.skip("no environment with open_clip and transformers: run `make peers`, or set PEERS_PYTHON")

    def run(command: str, *arguments: str | Path) -> str:
        line = [str(python), str(ROOT / "tests" / "peers" / "peer.py"), command, *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.strip()

    return run


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory for models of half a gigabyte, removed at once."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def clip_tokenizer(peer: Peer) -> Tokenizer:
    """CLIP's own, from the merges that open_clip brings."""
    return load_tokenizer(peer("merges"), 77)


def random_model(config: CLIPConfig, tokenizer: Tokenizer) -> InferenceModel:
    """A model with nothing at its default: neither zero biases nor unit gains."""
    torch.manual_seed(0)
    clip = CLIP(config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return InferenceModel(
        clip, tokenizer, config.vision.image_size, config.name, "runs/test", 7, 112, "0" * 64, MaskingConfig()
    )


def write_examples(path: Path, image_size: int, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Pixels and token ids, padded to the context length, as a file for the peer."""
    images = [resize_center_crop(decode_image(jpeg_bytes(seed, 320, 240)), image_size) for seed in range(3)]
    ids_BT = tokenizer.encode_batch(CAPTIONS)
    padding = (0, tokenizer.context_length - ids_BT.shape[1])
    tensors = {
        "images": normalize_pixels(torch.stack(images)),
        "tokens": torch.nn.functional.pad(ids_BT, padding),
    }
    save_file(tensors, path)
    return tensors


@torch.inference_mode()
def features(clip: CLIP, examples: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "image_features": clip.encode_image(examples["images"]),
        "text_features": clip.encode_text(examples["tokens"]),
        "logit_scale": clip.logit_scale.reshape(()),
    }


def assert_features_equal(theirs: dict[str, Tensor], ours: dict[str, Tensor], prefix: str = "") -> None:
    assert torch.equal(theirs[prefix + "logit_scale"], ours["logit_scale"])
    for name in ("image_features", "text_features"):
        value = ours[name]
        assert value.norm(dim=-1).sub(1).abs().max() < 1e-5
        # features that hardly depend on the input would be equal whatever the model did
        assert (value[0] - value[1]).abs().max() > 100 * TOLERANCE
        assert (theirs[prefix + name] - value).abs().max() <= TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-S-32", "ViT-S-16", "ViT-B-32", "ViT-B-16"])
def test_open_clip_gives_our_features(name: str, scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    model = random_model(config_from_name(name), clip_tokenizer)
    export(model, FORMATS["open_clip"], scratch / "export", random_examples(model, count=1))
    examples = write_examples(scratch / "examples", model.image_size, clip_tokenizer)
    peer("open_clip_features", name, scratch / "export", scratch / "examples", scratch / "features")
    theirs, ours = load_file(scratch / "features"), features(model.clip, examples)
    assert_features_equal(theirs, ours)
    assert_features_equal(theirs, ours, prefix="named_")


def test_open_clips_names_mean_our_sizes(scratch: Path, peer: Peer) -> None:
    names = ["ViT-S-32", "ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-16", "ViT-L-14", "ViT-H-14"]
    peer("open_clip_configs", ",".join(names), scratch / "configs")
    theirs = json.loads((scratch / "configs").read_text())
    for name in names:
        ours = open_clip_config(config_from_name(name))
        assert theirs[name]["embed_dim"] == ours["embed_dim"]
        for tower in ("vision_cfg", "text_cfg"):
            assert theirs[name][tower] | ours[tower] == theirs[name][tower], name


@pytest.mark.slow
def test_we_give_open_clips_features(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    name = "ViT-B-32"
    clip = CLIP.from_name(name).eval()
    examples = write_examples(scratch / "examples", clip.config.vision.image_size, clip_tokenizer)
    peer("open_clip_random", name, scratch / "weights", scratch / "examples", scratch / "features")
    clip.load_state_dict(from_open_clip(load_file(scratch / "weights")))
    assert_features_equal(load_file(scratch / "features"), features(clip, examples))


def odd_sized(tokenizer: Tokenizer) -> InferenceModel:
    """A model that no library knows by name: other image, patch, head and context sizes."""
    config = config_from_name("ViT-nano-8")
    vision = replace(config.vision, image_size=84, patch_size=14)
    text = replace(config.text, context_length=40)
    return random_model(
        replace(config, vision=vision, text=text), Tokenizer(tokenizer.encoder, tokenizer.source, context_length=40)
    )


@pytest.mark.slow
def test_open_clip_loads_other_sizes_tokens_and_pixels(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    model, folder = odd_sized(clip_tokenizer), scratch / "export"
    export(model, FORMATS["open_clip"], folder, random_examples(model))
    examples = write_examples(scratch / "examples", 84, model.tokenizer)
    peer("open_clip_features", "", folder, scratch / "examples", scratch / "features")
    assert_features_equal(load_file(scratch / "features"), features(model.clip, examples))

    (scratch / "captions").write_text(json.dumps(CAPTIONS))
    peer("open_clip_tokens", scratch / "captions", scratch / "tokens", f"local-dir:{folder}")
    assert torch.equal(load_file(scratch / "tokens")["tokens"], examples["tokens"])

    (scratch / "image.jpg").write_bytes(jpeg_bytes(0, 320, 240))
    peer("open_clip_pixels", folder, scratch / "image.jpg", scratch / "pixels")
    assert_pixels_close(load_file(scratch / "pixels")["pixels"], examples["images"][0])


@pytest.mark.slow
def test_transformers_gives_our_features(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    model, folder = random_model(config_from_name("ViT-B-32"), clip_tokenizer), scratch / "export"
    export(model, FORMATS["transformers"], folder, random_examples(model, count=1))
    examples = write_examples(scratch / "examples", model.image_size, clip_tokenizer)
    peer("transformers_features", folder, scratch / "examples", scratch / "features")
    assert_features_equal(load_file(scratch / "features"), features(model.clip, examples))


@pytest.mark.slow
def test_transformers_loads_other_sizes_tokens_and_pixels(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    model, folder = odd_sized(clip_tokenizer), scratch / "export"
    export(model, FORMATS["transformers"], folder, random_examples(model))
    # it mends neither quotes nor what is escaped for HTML, open_clip and we do
    captions = [text for text in CAPTIONS if "&" not in text and "“" not in text]
    (scratch / "captions").write_text(json.dumps(captions))
    (scratch / "image.jpg").write_bytes(jpeg_bytes(0, 320, 240))
    peer("transformers_inputs", folder, scratch / "captions", scratch / "image.jpg", scratch / "inputs")
    inputs = load_file(scratch / "inputs")
    for ids_T, text in zip(inputs["tokens"].tolist(), captions, strict=True):
        expected = model.tokenizer.encode(text)
        # it pads with end tokens
        assert ids_T == expected + [expected[-1]] * (40 - len(expected))
    expected_CHW = resize_center_crop(decode_image(jpeg_bytes(0, 320, 240)), 84)
    assert_pixels_close(inputs["pixels"], normalize_pixels(expected_CHW))

    peer_examples = {"images": inputs["pixels"][None], "tokens": inputs["tokens"]}
    save_file(peer_examples, scratch / "examples")
    peer("transformers_features", folder, scratch / "examples", scratch / "features")
    theirs, ours = load_file(scratch / "features"), features(model.clip, peer_examples)
    assert (theirs["text_features"] - ours["text_features"]).abs().max() <= TOLERANCE
    assert (theirs["image_features"] - ours["image_features"]).abs().max() <= TOLERANCE


def assert_pixels_close(theirs_CHW: Tensor, ours_CHW: Tensor) -> None:
    """Within what two bicubic filters on 8-bit pixels differ by: 2 grey levels, 0.03 after normalisation."""
    assert theirs_CHW.shape == ours_CHW.shape
    assert (theirs_CHW - ours_CHW).abs().max() <= 0.03


def many_captions() -> list[str]:
    """More than 200 captions: every pair of a beginning and an ending, and the peculiar ones."""
    beginnings = ["a dog", "Zoë's café", "I'LL", "they're", "日本の猫", "😀", "C-3PO", "İstanbul", "ΑΣ", "10 000 €"]
    beginnings += ["x²", "½", "  two   spaces ", "\u3000wide\u3000", "tab\tnew\nline\r\n", "zero\u200bwidth"]
    beginnings += ["don't_stop", "``x''"]
    endings = ["", "'s", " isn't here!", "...", " (1/2)", " #1", "&nbsp;&eacute;", " &copy; 2020", "’s", " “q”"]
    endings += ["\u2028z"]
    return [*map("".join, product(beginnings, endings)), *CAPTIONS]


@pytest.mark.slow
def test_clip_bpe_gives_open_clips_ids(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    captions = many_captions()
    assert len(set(captions)) > 200
    (scratch / "captions").write_text(json.dumps(captions))
    peer("open_clip_tokens", scratch / "captions", scratch / "tokens", "ViT-B-32")
    for text, theirs_T in zip(captions, load_file(scratch / "tokens")["tokens"].tolist(), strict=True):
        ours = clip_tokenizer.encode(text)
        assert theirs_T == ours + [0] * (77 - len(ours)), text
