"""Evaluation without a checkpoint: an untrained model, a tokenizer of letters, pictures of noise, sets of them."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from model.clip import CLIP
from model.config import config_from_name
from model.masking import MaskingConfig
from pipeline import evaluate as program
from pipeline.data.image_transform import Preprocessing
from pipeline.evaluation.features import FeatureEncoder, FeatureStore
from pipeline.evaluation.sets.files import Collection, ImageFile
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

CPU = torch.device("cpu")


class LetterTokenizer:
    """One token per letter; the end token is the largest id."""

    end_token_id = 127
    sha256 = "cd" * 32

    def encode_batch(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.tensor([*(1 + ord(letter) % 100 for letter in text), self.end_token_id]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def letter_model() -> InferenceModel:
    """Untrained, of images of 32 x 32, with a tokenizer of letters."""
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    config = replace(config, text=replace(config.text, vocab_size=128, eot_token_id=127))
    return InferenceModel(
        clip=CLIP(config).eval(),
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
        preprocessing=Preprocessing(32),
        name="ViT-test-8",
        checkpoint="runs/test/checkpoints/step_7",
        step=7,
        samples_seen=700,
        weights_sha256="ab" * 32,
        masking=MaskingConfig(),
    )


class OneAfterAnother(Ranks):
    """A rank whose peers run at other times: it waits for none."""

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None: ...


def encoder_of(model: InferenceModel, rank: int = 0, world_size: int = 1) -> FeatureEncoder:
    ranks = OneAfterAnother(rank, rank, world_size, CPU)
    return FeatureEncoder(model.identity, model.clip, model.tokenizer, model.preprocessing, ranks, workers=2)


def encode(encoder: FeatureEncoder, items: Sequence[ImageFile] | Sequence[str], batch_size: int = 3) -> Tensor:
    """Features of items by way of a store."""
    kind = "texts" if isinstance(items[0], str) else "images"
    with tempfile.TemporaryDirectory() as output:
        store = FeatureStore(Path(output), Collection("some", kind, items), {"name": "m"}, batch_size)
        encoder.encode(store, range(store.num_batches))
        return store.load()[0].clone()


def write_noise(directory: Path) -> list[ImageFile]:
    """Eight pictures of noise, the later the stronger."""
    files = []
    for index in range(8):
        path = directory / f"{index}.png"
        Image.effect_noise((50, 40), 20 + 10 * index).convert("RGB").save(path)
        files.append(ImageFile.whole(path))
    return files


def retrieval_set(directory: Path, images: Sequence[ImageFile]) -> Path:
    """Three captions each, one the same for all; in two shards."""
    (directory / "test").mkdir(parents=True)
    for shard, part in enumerate((images[:5], images[5:])):
        with tarfile.open(directory / "test" / f"{shard}.tar", "w") as tar:
            for image in part:
                caption = f"picture {image.path.stem}\nanother {image.path.stem}\nthe same\n".encode()
                for name, data in ((f"{image.path.stem}.png", image.read()), (f"{image.path.stem}.txt", caption)):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    (directory / "test" / "nshards.txt").write_text("2\n")
    return directory


def run_program(monkeypatch: pytest.MonkeyPatch, model: InferenceModel, *arguments: str) -> int:
    """evaluate.py in this process, where any checkpoint is the model."""
    monkeypatch.setattr(program, "load_any_model", lambda path, device, tokenizer, name: model)
    monkeypatch.setattr(program, "init_ranks", lambda patience: Ranks(0, 0, 1, CPU))
    return program.main(["--checkpoint", "runs/test", *arguments])
