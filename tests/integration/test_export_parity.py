"""Exports are loaded by open_clip and transformers, and give the features and token ids that they give here.

Needs the environment of `make peers`, or another one named by PEERS_PYTHON.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import jpeg_bytes
from peers.cases import (
    CASES,
    PECULIAR_CAPTIONS,
    Case,
    Features,
    both_ways,
    differences,
    small_config,
    untrained_model,
)
from peers.client import Peer
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import config_from_name
from model.packing import normalize_pixels
from model.towers import resize_grid
from pipeline.data.captions import Tokenizer, load_tokenizer
from pipeline.data.image_transform import decode_image, resize_center_crop
from pipeline.export import FORMATS, export, random_examples
from pipeline.foreign.open_clip_folder import model_cfg

TOLERANCE = 1e-5


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory for models of half a gigabyte, removed at once."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def clip_tokenizer(peer: Peer) -> Tokenizer:
    """CLIP's own, from the merges that open_clip brings."""
    return load_tokenizer(peer("merges"), 77)


def assert_features_equal(theirs: Features, ours: Features) -> None:
    assert torch.equal(theirs["logit_scale"], ours["logit_scale"])
    for name in ("image_features", "text_features"):
        value = ours[name]
        assert value.norm(dim=-1).sub(1).abs().max() < 1e-5
        # features that hardly depend on the input would be equal whatever the model did
        assert (value[0] - value[1]).abs().max() > 100 * TOLERANCE
    found = differences(theirs, ours)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_features_agree_in_both_directions(case: Case, scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    for theirs, ours in both_ways(case, scratch, clip_tokenizer, peer).values():
        assert_features_equal(theirs, ours)


def test_open_clips_names_mean_our_sizes(scratch: Path, peer: Peer) -> None:
    names = ["ViT-S-32", "ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-16", "ViT-L-14", "ViT-H-16", "ViT-H-14"]
    names += ["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-H-14-quickgelu"]
    peer("open_clip_configs", ",".join(names), scratch / "configs")
    theirs = json.loads((scratch / "configs").read_text())
    for name in names:
        ours = model_cfg(config_from_name(name))
        assert theirs[name]["embed_dim"] == ours["embed_dim"]
        assert theirs[name].get("quick_gelu", False) == ours["quick_gelu"]
        for tower in ("vision_cfg", "text_cfg"):
            assert theirs[name][tower] | ours[tower] == theirs[name][tower], name


@pytest.mark.parametrize(("old", "new"), [(7, 14), (14, 7), (16, 24), (14, 9)])
def test_positions_are_resized_as_open_clip_does(old: int, new: int, scratch: Path, peer: Peer) -> None:
    positions = torch.randn(old * old + 1, 24)
    save_file({"visual.positional_embedding": positions}, scratch / "old")
    peer("open_clip_resized", scratch / "old", str(new), scratch / "new")
    theirs = load_file(scratch / "new")["visual.positional_embedding"]
    assert torch.allclose(resize_grid(positions, new * new), theirs, rtol=0, atol=1e-6)


def small_export(library: str, folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """Export a small model; its tokenizer, which has another context length."""
    config = small_config()
    tokenizer = Tokenizer(tokenizer.encoder, tokenizer.source, config.text.context_length)
    model = untrained_model(config, tokenizer)
    export(model, FORMATS[library], folder, random_examples(model))
    return tokenizer


def our_pixels(jpeg: bytes) -> Tensor:
    return normalize_pixels(resize_center_crop(decode_image(jpeg), small_config().vision.image_size))


def test_open_clip_makes_our_tokens_and_pixels(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    folder = scratch / "export"
    tokenizer = small_export("open_clip", folder, clip_tokenizer)
    (scratch / "captions").write_text(json.dumps(PECULIAR_CAPTIONS))
    peer("open_clip_tokens", scratch / "captions", scratch / "tokens", f"local-dir:{folder}")
    theirs = load_file(scratch / "tokens")["tokens"]
    for theirs_T, text in zip(theirs.tolist(), PECULIAR_CAPTIONS, strict=True):
        ours = tokenizer.encode(text)
        assert theirs_T == ours + [0] * (40 - len(ours)), text

    (scratch / "image.jpg").write_bytes(jpeg_bytes(0, 320, 240))
    peer("open_clip_pixels", folder, scratch / "image.jpg", scratch / "pixels")
    assert_pixels_close(load_file(scratch / "pixels")["pixels"], our_pixels(jpeg_bytes(0, 320, 240)))


def test_transformers_makes_our_tokens_and_pixels(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    folder = scratch / "export"
    tokenizer = small_export("transformers", folder, clip_tokenizer)
    # it mends neither quotes nor what is escaped for HTML, open_clip and we do
    captions = [text for text in PECULIAR_CAPTIONS if "&" not in text and "“" not in text]
    (scratch / "captions").write_text(json.dumps(captions))
    (scratch / "image.jpg").write_bytes(jpeg_bytes(0, 320, 240))
    peer("transformers_inputs", folder, scratch / "captions", scratch / "image.jpg", scratch / "inputs")
    inputs = load_file(scratch / "inputs")
    for theirs_T, text in zip(inputs["tokens"].tolist(), captions, strict=True):
        ours = tokenizer.encode(text)
        # it pads with end tokens
        assert theirs_T == ours + [ours[-1]] * (40 - len(ours)), text
    assert_pixels_close(inputs["pixels"], our_pixels(jpeg_bytes(0, 320, 240)))


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
    return [*map("".join, product(beginnings, endings)), *PECULIAR_CAPTIONS]


@pytest.mark.slow
def test_clip_bpe_gives_open_clips_ids(scratch: Path, peer: Peer, clip_tokenizer: Tokenizer) -> None:
    captions = many_captions()
    assert len(set(captions)) > 200
    (scratch / "captions").write_text(json.dumps(captions))
    peer("open_clip_tokens", scratch / "captions", scratch / "tokens", "ViT-B-32")
    for text, theirs_T in zip(captions, load_file(scratch / "tokens")["tokens"].tolist(), strict=True):
        ours = clip_tokenizer.encode(text)
        assert theirs_T == ours + [0] * (77 - len(ours)), text
