"""What counts as a checkpoint, and what is refused when one is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from saved_runs import save_model

from formats.errors import UserError
from model.clip import CLIP
from pipeline.data.captions import load_tokenizer
from pipeline.inference import load_for_inference
from pipeline.recipe_files import load_recipe
from pipeline.training.checkpoints.checkpoint import newest_checkpoint, what_is_missing
from pipeline.training.progress import Progress
from pipeline.training.run_record import check_unchanged, write_record

CPU = torch.device("cpu")


def save(run: Path, step: int, tokenizer_file: Path) -> Path:
    tokenizer = load_tokenizer(str(tokenizer_file), 77)
    recipe = load_recipe("demo", ["model.name=ViT-test-8", "model.context_length=20"])
    clip = CLIP(recipe.clip_config(tokenizer.encoder.vocab_size, tokenizer.encoder.end_token_id))
    directory = run / "checkpoints" / f"step_{step:08d}"
    directory.mkdir(parents=True)
    save_model(directory, clip, clip.state_dict(), Progress(step, step * 16), tokenizer)
    return directory


def test_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path, tokenizer_file: Path) -> None:
    first, second = save(tmp_path, 1, tokenizer_file), save(tmp_path, 2, tokenizer_file)
    assert newest_checkpoint(tmp_path) == second
    weights = second / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert "has" in str(what_is_missing(second))
    assert newest_checkpoint(tmp_path) == first
    weights.unlink()
    assert what_is_missing(second) == "model.safetensors is missing"
    (first / "COMPLETE.json").write_text("{")
    with pytest.raises(UserError, match=r"step_00000002 cannot be used: model\.safetensors is missing"):
        newest_checkpoint(tmp_path)
    weights.write_bytes(content)
    assert newest_checkpoint(tmp_path) == second


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None


def replace_file(file: Path, content: bytes) -> None:
    """Another file in a checkpoint that is complete all the same."""
    file.write_bytes(content)
    complete = json.loads((file.parent / "COMPLETE.json").read_text())
    complete["files"][file.name] |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (file.parent / "COMPLETE.json").write_text(json.dumps(complete))


def test_inference_refuses_what_does_not_fit(tmp_path: Path, tokenizer_file: Path) -> None:
    directory = save(tmp_path, 1, tokenizer_file)
    assert load_for_inference(str(tmp_path), CPU, str(tokenizer_file)).step == 1
    assert load_for_inference(str(directory), CPU).name == "ViT-test-8"

    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["other words entirely"] * 50),
        model_prefix=str(tmp_path / "other"),
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="is not the tokenizer that"):
        load_for_inference(str(tmp_path), CPU, str(tmp_path / "other.model"))

    own = (directory / "tokenizer.bin").read_bytes()
    replace_file(directory / "tokenizer.bin", (tmp_path / "other.model").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.bin is not the tokenizer that .*model\.json names"):
        load_for_inference(str(directory), CPU)
    replace_file(directory / "tokenizer.bin", own)

    card = json.loads((directory / "model.json").read_text())
    card["model"]["vision"]["width"] = 64
    replace_file(directory / "model.json", json.dumps(card).encode())
    with pytest.raises(UserError, match="belong to different models"):
        load_for_inference(str(directory), CPU)
    with pytest.raises(UserError, match="no run or checkpoint at"):
        load_for_inference(str(tmp_path / "absent"), CPU)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load_for_inference(str(tmp_path / "checkpoints"), CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_inference_refuses_flipped_bits(tmp_path: Path, tokenizer_file: Path, name: str) -> None:
    directory = save(tmp_path, 1, tokenizer_file)
    content = bytearray((directory / name).read_bytes())
    content[-3] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"is damaged: {name} has another sha256 than when it was written; take another"
    ):
        load_for_inference(str(directory), CPU)


def test_a_run_is_continued_only_as_it_was_started(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    write_record(tmp_path, recipe, {"manifest_sha256": "aa", "tokenizer_sha256": "bb", "word_counts_sha256": "cc"})
    check_unchanged(tmp_path, recipe, "aa", "bb", "cc")
    check_unchanged(tmp_path, load_recipe("demo", ["data.workers=7", "train.log_every_steps=1"]), "aa", "bb", None)
    with pytest.raises(UserError, match=r"optimizer\.lr=0\.001, now it is 0\.1"):
        check_unchanged(tmp_path, load_recipe("demo", ["optimizer.lr=0.1"]), "aa", "bb", None)
    with pytest.raises(UserError, match="other data"):
        check_unchanged(tmp_path, recipe, "dd", "bb", None)
    with pytest.raises(UserError, match="other tokenizer"):
        check_unchanged(tmp_path, recipe, "aa", "dd", None)
    with pytest.raises(UserError, match="other word counts"):
        check_unchanged(tmp_path, recipe, "aa", "bb", "dd")
