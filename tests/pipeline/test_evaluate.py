"""Evaluation from files to results.jsonl, with an untrained model and a tokenizer of letters."""

from __future__ import annotations

import io
import json
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
from model.patches import normalize_pixels
from pipeline import evaluate as program
from pipeline.data.image_transform import decode_image, resize_center_crop
from pipeline.errors import UserError
from pipeline.evaluation.datasets import (
    ClassificationSample,
    ClassificationSet,
    CompositionSample,
    CompositionSet,
    RetrievalSample,
    RetrievalSet,
)
from pipeline.evaluation.features import FeatureEncoder, distinct, rank_share
from pipeline.evaluation.results import Result, format_table, read_results, write_results
from pipeline.evaluation.tar_samples import ImageFile
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

CPU = torch.device("cpu")


class LetterTokenizer:
    """One token per letter; the end token is the largest id."""

    end_token_id = 127

    def encode_batch(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.tensor([*(1 + ord(letter) % 100 for letter in text), self.end_token_id]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    config = replace(config, text=replace(config.text, vocab_size=128, eot_token_id=127))
    return InferenceModel(
        clip=CLIP(config).eval(),
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
        image_size=32,
        name="ViT-test-8",
        checkpoint="runs/test/checkpoints/step_7",
        step=7,
        samples_seen=700,
        weights_sha256="ab" * 32,
        masking=MaskingConfig(),
    )


def encoder_of(model: InferenceModel, batch_size: int = 3, rank: int = 0, world_size: int = 1) -> FeatureEncoder:
    return FeatureEncoder(model, Ranks(rank, rank, world_size, CPU), batch_size, workers=2)


@pytest.fixture
def images(tmp_path: Path) -> list[ImageFile]:
    files = []
    for index in range(8):
        path = tmp_path / f"{index}.png"
        Image.effect_noise((50, 40), 20 + 10 * index).convert("RGB").save(path)
        files.append(ImageFile.whole(path))
    return files


def test_image_features_are_the_models_own_in_order(model: InferenceModel, images: list[ImageFile]) -> None:
    pixels_BCHW = torch.stack([resize_center_crop(decode_image(image.path.read_bytes()), 32) for image in images])
    with torch.no_grad():
        expected_ND = model.clip.encode_image(normalize_pixels(pixels_BCHW))
    torch.testing.assert_close(encoder_of(model).encode_images(images), expected_ND)


def test_masked_features_depend_on_the_image_alone(model: InferenceModel, images: list[ImageFile]) -> None:
    masking = MaskingConfig(strategy="cluster", target_mask_ratio=0.5)
    masked = replace(encoder_of(model, batch_size=3), masking=masking).encode_images(images)
    in_other_batches = replace(encoder_of(model, batch_size=8), masking=masking).encode_images(images[::-1])
    torch.testing.assert_close(masked, in_other_batches.flip(0))
    assert masked.norm(dim=1) == pytest.approx(torch.ones(8))
    assert (masked - encoder_of(model).encode_images(images)).abs().max() > 1e-3
    nothing_hidden = replace(encoder_of(model), masking=MaskingConfig(strategy="none")).encode_images(images)
    torch.testing.assert_close(nothing_hidden, encoder_of(model).encode_images(images))


def test_text_features_do_not_depend_on_the_batch(model: InferenceModel) -> None:
    texts = ["a", "a red square", "three discs left of a cross", "b", "a red square"]
    one_by_one = encoder_of(model, batch_size=1).encode_texts(texts)
    torch.testing.assert_close(encoder_of(model, batch_size=4).encode_texts(texts), one_by_one)
    assert one_by_one.norm(dim=1) == pytest.approx(torch.ones(5))


@pytest.mark.parametrize("total", [0, 1, 2, 7, 100])
def test_shares_of_the_ranks_follow_one_another(total: int) -> None:
    shares = [range(total)[rank_share(total, Ranks(rank, rank, 3, CPU))] for rank in range(3)]
    assert [item for share in shares for item in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_distinct_is_undone_by_its_index() -> None:
    items, index_N = distinct(["b", "a", "b", "c", "a"])
    assert items == ["b", "a", "c"]
    assert [items[index] for index in index_N] == ["b", "a", "b", "c", "a"]


def test_an_image_that_does_not_decode_stops_the_evaluation(model: InferenceModel, images: list[ImageFile]) -> None:
    images[5].path.write_bytes(b"\xff\xd8\xff\xe0 not a jpeg" + bytes(40))
    with pytest.raises(UserError, match=r"5\.png does not decode"):
        encoder_of(model).encode_images([*images[:5], ImageFile.whole(images[5].path)])


def test_features_that_are_not_finite_stop_the_evaluation(model: InferenceModel, images: list[ImageFile]) -> None:
    broken = CLIP(model.clip.config)
    with torch.no_grad():
        broken.visual.proj.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite for 8 of 8 images"):
        encoder_of(replace(model, clip=broken)).encode_images(images)


def test_scores_of_each_task(model: InferenceModel, images: list[ImageFile]) -> None:
    encoder = encoder_of(model)
    classes = ClassificationSet(
        "c", ("one", "two"), ("a {c}",), tuple(ClassificationSample(image, i % 2) for i, image in enumerate(images))
    )
    scores = program.evaluate(encoder, classes)
    assert scores.metrics.keys() == scores.chance.keys() == {"acc1", "mean_per_class_recall"}
    assert scores.template_sha256 is not None

    # with the text "one" as the only difference, the prediction is the nearer of two prompts
    text_features_CD = encoder.encode_texts(["a one", "a two"])
    predicted_N = (encoder.encode_images(images) @ text_features_CD.T).argmax(dim=1)
    assert scores.metrics["acc1"] == pytest.approx((predicted_N == torch.arange(8) % 2).float().mean().item())

    pairs = RetrievalSet("r", tuple(RetrievalSample(image, (f"{i}", f"n {i}")) for i, image in enumerate(images)))
    scores = program.evaluate(encoder, pairs)
    assert scores.metrics.keys() == scores.chance.keys()
    assert scores.metrics["image_retrieval_recall@10"] == 1
    assert scores.chance["image_retrieval_recall@1"] == pytest.approx(1 / 8)

    hard = CompositionSet("h", tuple(CompositionSample(image, "swap_att", "ab", "ba") for image in images))
    scores = program.evaluate(encoder, hard)
    assert scores.chance == {"acc": 0.5, "acc/swap_att": 0.5}
    assert scores.samples == 8


def write_composition_set(directory: Path) -> None:
    (directory / "images").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).convert("RGB").save(buffer, "JPEG")
    (directory / "images" / "1.jpg").write_bytes(buffer.getvalue())
    entry = {"filename": "1.jpg", "caption": "a red cat", "negative_caption": "a blue cat"}
    (directory / "replace_att.json").write_text(json.dumps({"0": entry}))


def run_program(monkeypatch: pytest.MonkeyPatch, model: InferenceModel, *arguments: str) -> int:
    monkeypatch.setattr(program, "load_for_inference", lambda path, device, tokenizer: model)
    monkeypatch.setattr(program, "init_ranks", lambda: Ranks(0, 0, 1, CPU))
    return program.main(["--checkpoint", "runs/test", *arguments])


def test_program_writes_results_and_prints_chance(
    tmp_path: Path, model: InferenceModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_composition_set(tmp_path / "crepe")
    arguments = ("--data", str(tmp_path / "crepe"), "--output", str(tmp_path / "out"), "--local_rank=0")
    assert run_program(monkeypatch, model, *arguments) == 0
    assert run_program(monkeypatch, model, *arguments, "--tasks", "composition") == 0
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    fields = json.loads(line)
    assert fields["dataset"] == "crepe"
    assert fields["task"] == "image_caption_selection"
    assert fields["metrics"].keys() == {"acc", "acc/replace_att"}
    assert (fields["step"], fields["samples_seen"], fields["samples"]) == (7, 700, 1)
    assert "template_sha256" not in fields
    assert "50.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("zeroshot", "no dataset for task zeroshot"), ("zeroshoot", "unknown task 'zeroshoot'")],
)
def test_program_refuses_tasks_that_it_cannot_do(
    tasks: str, message: str, tmp_path: Path, model: InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_composition_set(tmp_path / "crepe")
    with pytest.raises(UserError, match=message):
        run_program(monkeypatch, model, "--data", str(tmp_path / "crepe"), "--output", str(tmp_path), "--tasks", tasks)


def result_of(dataset: str, acc1: float, checkpoint: str = "a") -> Result:
    return Result("m", checkpoint, dataset, "zeroshot_classification", {"acc1": acc1}, samples=10)


def test_results_replace_their_own_key_only(tmp_path: Path) -> None:
    write_results(tmp_path, [result_of("x", 0.1), result_of("y", 0.2)])
    file = write_results(tmp_path, [result_of("x", 0.3), result_of("x", 0.4, checkpoint="b")])
    assert [(r.dataset, r.checkpoint, r.metrics["acc1"]) for r in read_results(file)] == [
        ("x", "a", 0.3),
        ("y", "a", 0.2),
        ("x", "b", 0.4),
    ]


def test_results_file_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 1 is not a result"):
        write_results(tmp_path, [result_of("x", 0.1)])
    assert (tmp_path / "results.jsonl").read_text() == "precious\n"


def test_unknown_fields_of_a_result_are_ignored(tmp_path: Path) -> None:
    line = json.loads(result_of("x", 0.5).to_json()) | {"pretrained": "laion", "language": "en"}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n\n")
    assert read_results(tmp_path / "results.jsonl") == [result_of("x", 0.5)]


def test_table_shows_chance_beside_each_figure() -> None:
    result = replace(result_of("shapes", 0.4321), chance={"acc1": 0.05})
    assert "shapes   acc1    43.21    5.00       10" in format_table([result])


def test_a_rank_stops_when_another_fails(model: InferenceModel, images: list[ImageFile]) -> None:
    class FailingElsewhere(Ranks):
        def any(self, flag: bool) -> bool:
            return True

    with pytest.raises(UserError, match="another rank"):
        replace(encoder_of(model), ranks=FailingElsewhere(0, 0, 1, CPU)).encode_images(images)
