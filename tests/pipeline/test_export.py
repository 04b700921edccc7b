"""The export command: what it writes, prints and refuses. What libraries make of it: test_export_parity.py."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch

from model.clip import CLIP
from model.config import config_from_name
from model.masking import MaskingConfig
from pipeline.checkpoint import Progress, _publish, _write_model_files
from pipeline.errors import UserError
from pipeline.export import main
from pipeline.export_formats import FORMATS
from pipeline.tokenizer import Tokenizer, _byte_symbols, load_tokenizer


def synthetic_merges(path: Path, count: int = 48_894) -> Path:
    """A merges file of the size of CLIP's, with merges of no meaning."""
    pairs = islice(product(_byte_symbols(), repeat=2), count)
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *map(" ".join, pairs)]).encode()))
    return path


def save_run(run: Path, tokenizer: Tokenizer, diverged: bool = False) -> Path:
    """A run with one checkpoint of a tiny model."""
    directory = run / "checkpoints" / "step_00000007"
    directory.mkdir(parents=True)
    config = config_from_name("ViT-test-8")
    encoder = tokenizer.encoder
    text = replace(config.text, vocab_size=encoder.vocab_size, eot_token_id=encoder.end_token_id)
    clip = CLIP(replace(config, text=text))
    weights = dict(clip.state_dict())
    if diverged:
        weights["visual.ln_post.bias"] = torch.full((32,), torch.nan)
    _write_model_files(directory, clip, weights, Progress(7, 112), tokenizer, MaskingConfig())
    _publish(directory, Progress(7, 112), world_size=1)
    return run


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_run_becomes_a_folder(
    name: str, tmp_path: Path, shards: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = save_run(tmp_path / "run", load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77))
    output = tmp_path / "exports" / "first"
    arguments = [str(run), "--format", name, "--output", str(output), "--images", str(shards)]
    done = launch("pipeline/export.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"8 images of {shards}, 8 captions of {shards}" in done.stdout
    assert "differ by at most 0.0e+00 (images), 0.0e+00 (texts)" in done.stdout
    assert {path.suffix for path in output.iterdir()} <= {".json", ".txt", ".safetensors"}
    assert list(output.parent.iterdir()) == [output]
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1

    again = launch("pipeline/export.py", *arguments)
    assert again.returncode == 2
    assert again.stderr == f"error: {output} is already there: choose another --output\n"


def test_what_cannot_be_exported_is_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    pieces = save_run(tmp_path / "pieces", load_tokenizer(str(tokenizer_file), 77))
    small = save_run(tmp_path / "small", load_tokenizer(str(synthetic_merges(tmp_path / "small.gz", count=10)), 77))
    output = str(tmp_path / "output")
    for name in FORMATS:
        with pytest.raises(UserError, match=r"SentencePiece tokenizer.*data\.tokenizer=clip-bpe"):
            main([str(pieces), "--format", name, "--output", output])
    with pytest.raises(UserError, match=r"524 byte pairs.*--format transformers"):
        main([str(small), "--format", "open_clip", "--output", output])
    assert main([str(small), "--format", "transformers", "--output", output]) == 0
    vocabulary = json.loads((tmp_path / "output" / "vocab.json").read_text(encoding="utf-8"))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (522, 523)


def test_a_diverged_model_leaves_nothing_behind(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77)
    run = save_run(tmp_path / "run", tokenizer, diverged=True)
    with pytest.raises(UserError, match=r"was not exported.*nan.*diverged"):
        main([str(run), "--format", "open_clip", "--output", str(tmp_path / "exports" / "first")])
    assert list((tmp_path / "exports").iterdir()) == []
