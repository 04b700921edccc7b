"""Evaluation from files to results.jsonl, by its program, with an untrained model and a tokenizer of letters."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from evaluation_material import CPU, encode, encoder_of, letter_model, retrieval_set, run_program, write_noise
from PIL import Image

from formats.errors import UserError
from pipeline import evaluate as program
from pipeline import report
from pipeline.evaluation.jobs import Slice, encode_slice, make_job, score_job
from pipeline.evaluation.results import read_results
from pipeline.evaluation.sets.composition import CompositionSample, CompositionSet
from pipeline.evaluation.sets.files import ImageFile
from pipeline.evaluation.sets.layouts import (
    ClassificationSample,
    ClassificationSet,
    EvaluationSet,
    RetrievalSample,
    RetrievalSet,
)
from pipeline.evaluation.tasks.task import Scores
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return letter_model()


@pytest.fixture
def images(tmp_path: Path) -> list[ImageFile]:
    return write_noise(tmp_path)


def scores_of(model: InferenceModel, dataset: EvaluationSet, output: Path) -> Scores:
    job = make_job(model.identity, output, dataset, None, batch_size=3, masking=None)
    encode_slice(job, encoder_of(model), Slice(), output)
    (result,) = score_job(job, output)
    return Scores(result.metrics, result.chance, result.samples, result.template_sha256)


def test_scores_of_each_task(model: InferenceModel, images: list[ImageFile], tmp_path: Path) -> None:
    classes = ClassificationSet(
        "c", ("one", "two"), ("a {c}",), tuple(ClassificationSample(image, i % 2) for i, image in enumerate(images))
    )
    scores = scores_of(model, classes, tmp_path)
    assert scores.metrics.keys() == scores.chance.keys() == {"acc1", "mean_per_class_recall"}
    assert scores.template_sha256 is not None

    # with the text "one" as the only difference, the prediction is the nearer of two prompts
    text_features_CD = encode(encoder_of(model), ["a one", "a two"])
    predicted_N = (encode(encoder_of(model), images) @ text_features_CD.T).argmax(dim=1)
    assert scores.metrics["acc1"] == pytest.approx((predicted_N == torch.arange(8) % 2).float().mean().item())

    pairs = RetrievalSet("r", tuple(RetrievalSample(image, (f"{i}", f"n {i}")) for i, image in enumerate(images)))
    scores = scores_of(model, pairs, tmp_path)
    assert scores.metrics.keys() == scores.chance.keys()
    assert scores.metrics["image_retrieval_recall@10"] == 1
    assert scores.chance["image_retrieval_recall@1"] == pytest.approx(1 / 8)

    hard = CompositionSet("h", tuple(CompositionSample(image, "swap_att", "ab", "ba") for image in images))
    scores = scores_of(model, hard, tmp_path)
    assert scores.chance == {"acc": 0.5, "acc/swap_att": 0.5, "acc/attribute": 0.5}
    assert scores.samples == 8


def write_composition_set(directory: Path) -> None:
    (directory / "images").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).convert("RGB").save(buffer, "JPEG")
    (directory / "images" / "1.jpg").write_bytes(buffer.getvalue())
    entry = {"filename": "1.jpg", "caption": "a red cat", "negative_caption": "a blue cat"}
    (directory / "replace_att.json").write_text(json.dumps({"0": entry}))


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
    assert fields["metrics"].keys() == {"acc", "acc/replace_att", "acc/attribute"}
    assert fields["intervals"].keys() == fields["metrics"].keys()
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


def classification_set(directory: Path, images: Sequence[ImageFile]) -> Path:
    (directory / "test").mkdir(parents=True)
    with tarfile.open(directory / "test" / "0.tar", "w") as tar:
        for number, image in enumerate(images):
            label = str(number % 3).encode()
            for name, data in ((f"{image.path.stem}.png", image.read()), (f"{image.path.stem}.cls", label)):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    (directory / "test" / "nshards.txt").write_text("1\n")
    (directory / "classnames.txt").write_text("dog\ncat\nowl\n")
    (directory / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    return directory


def test_features_in_bf16_are_near_and_are_kept_apart(
    model: InferenceModel, images: list[ImageFile], tmp_path: Path
) -> None:
    dataset = ClassificationSet(
        "c", ("one", "two"), ("a {c}",), tuple(ClassificationSample(image, i % 2) for i, image in enumerate(images))
    )
    features = {}
    for precision in ("", "bf16"):
        encoder = replace(encoder_of(model), model=replace(model.identity, precision=precision))
        job = make_job(encoder.model, tmp_path, dataset, None, batch_size=3, masking=None)
        encode_slice(job, encoder, Slice(), tmp_path)
        (result,) = score_job(job, tmp_path)
        assert result.details.get("precision", "") == precision
        features[precision] = job.stores(tmp_path)["zeroshot"]["images"].load()[0]
    difference = (features[""] - features["bf16"]).abs().max()
    assert 0 < difference < 0.02
    assert torch.allclose(features["bf16"].norm(dim=1), torch.ones(len(images)), atol=1e-6)


def test_word_counts_give_accuracy_by_frequency_also_when_collecting(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = classification_set(tmp_path / "animals", images), tmp_path / "out"
    words = tmp_path / "words.json"
    arguments = ("--data", str(data), "--output", str(output), "--word-counts", str(words))
    with pytest.raises(UserError, match=r"cannot read word counts at .*words\.json"):
        run_program(monkeypatch, model, *arguments)
    counts = {"dog": 5, "cat": 2, "owl": 1}
    words.write_text(json.dumps({"format_version": 1, "captions": 5, "words": 10, "counts": counts}))
    assert run_program(monkeypatch, model, *arguments, "--slice", "0/1") == 0
    assert report.main(["collect", str(output)]) == 0
    (result,) = read_results(output / "results.jsonl")
    by_frequency = [result.metrics[f"acc1/{third}"] for third in ("rare", "medium", "frequent")]
    assert sum(by_frequency) / 3 == pytest.approx(result.metrics["mean_per_class_recall"])
    assert result.details["word_frequency"]["rare"] == {"classes": 1, "from": 0.1, "to": 0.1}
    assert run_program(monkeypatch, model, *arguments[:4]) == 0  # without them: the figures without
    assert "acc1/rare" not in read_results(output / "results.jsonl")[0].metrics


def test_a_sweep_file_stands_for_options(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = retrieval_set(tmp_path / "pictures", images)
    write_composition_set(tmp_path / "crepe")
    loaded = []
    monkeypatch.setattr(program, "load_any_model", lambda path, *_: loaded.append(path) or replace(model, name=path))
    monkeypatch.setattr(program, "init_ranks", lambda patience: Ranks(0, 0, 1, CPU))
    sweep = tmp_path / "sweep.yaml"
    content = {"checkpoint": ["a", "b"], "data": [str(data), str(tmp_path / "crepe")], "output": str(tmp_path / "out")}
    sweep.write_text(yaml.safe_dump(content | {"tasks": "retrieval"}))
    assert program.main(["--sweep", str(sweep)]) == 0
    assert loaded == ["a", "b"]
    found = [(result.model, result.dataset) for result in read_results(tmp_path / "out" / "results.jsonl")]
    assert found == [("a", "pictures"), ("b", "pictures")]
    # the command line has the last word
    assert program.main(["--sweep", str(sweep), "--checkpoint", "c", "--tasks", "auto"]) == 0
    assert {result.dataset for result in read_results(tmp_path / "out" / "results.jsonl") if result.model == "c"} == {
        "pictures",
        "crepe",
    }
    for wrong, message in (
        ({"checkpoints": ["a"]}, "unknown key 'checkpoints': did you mean 'checkpoint'"),
        ({"batch_size": 0}, "batch_size: Input should be greater than 0"),
    ):
        sweep.write_text(yaml.safe_dump(content | wrong))
        with pytest.raises(UserError, match=message):
            program.main(["--sweep", str(sweep)])
    with pytest.raises(SystemExit):
        program.main(["--data", str(data), "--output", "x"])


def padded(images: Sequence[ImageFile]) -> list[ImageFile]:
    """The same pictures in files of one size: what follows the end of a PNG is not part of it."""
    for image in images:
        image.path.write_bytes(image.read().ljust(10_000, b"\0"))
    return [ImageFile.whole(image.path) for image in images]


def test_a_set_corrected_in_place_gets_features_of_its_own(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither names nor places nor sizes tell the pictures apart."""
    images = padded(images)
    data = classification_set(tmp_path / "animals", images)
    arguments = ("--data", str(data), "--batch-size", "3", "--output")
    assert run_program(monkeypatch, model, *arguments, str(tmp_path / "out")) == 0
    untouched = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*.safetensors")}
    assert run_program(monkeypatch, model, *arguments, str(tmp_path / "out")) == 0
    assert untouched == {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*.safetensors")
    }
    (before,) = read_results(tmp_path / "out" / "results.jsonl")

    shutil.rmtree(data)
    first, second = images[0].read(), images[1].read()
    images[0].path.write_bytes(second)
    images[1].path.write_bytes(first)
    classification_set(data, images)
    with pytest.raises(UserError, match=r"animals has changed since the features in .* were computed; run evaluate"):
        report.main(["collect", str(tmp_path / "out")])
    assert read_results(tmp_path / "out" / "results.jsonl") == [before]
    for output in ("out", "afresh"):
        assert run_program(monkeypatch, model, *arguments, str(tmp_path / output)) == 0
    (corrected,), (afresh,) = (read_results(tmp_path / name / "results.jsonl") for name in ("out", "afresh"))
    assert replace(corrected, wall_time_s=None) == replace(afresh, wall_time_s=None)
    assert corrected.content_sha256 != before.content_sha256


def write_labelled(split: Path, images: Sequence[ImageFile], labels: Sequence[int]) -> None:
    split.mkdir(parents=True)
    with tarfile.open(split / "0.tar", "w") as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            for name, data in ((f"{number}.png", image.read()), (f"{number}.cls", str(label).encode())):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    (split / "nshards.txt").write_text("1")


@pytest.mark.slow
def test_probes_are_done_when_asked_for_and_share_features(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "noise", tmp_path / "out"
    write_labelled(data / "test", images, [0, 0, 0, 0, 1, 1, 1, 1])
    write_labelled(data / "train", images * 2, [0, 0, 0, 0, 1, 1, 1, 1] * 2)
    (data / "classnames.txt").write_text("faint\nstrong\n")
    (data / "zeroshot_classification_templates.txt").write_text("{c} noise\n")
    arguments = ("--data", str(data), "--output", str(output))
    assert run_program(monkeypatch, model, *arguments) == 0
    assert [result.task for result in read_results(output / "results.jsonl")] == ["zeroshot_classification"]
    assert run_program(monkeypatch, model, *arguments, "--tasks", "linear_probe,few_shot") == 0
    results = {result.task: result for result in read_results(output / "results.jsonl")}
    assert results["linear_probe"].metrics["lp_acc1"] >= 0.75  # the same pictures
    assert results["linear_probe"].details["training_samples"] == 16
    assert results["few_shot_linear_probe"].metrics.keys() == {"lp_acc1/1_shot", "lp_acc1/2_shot", "lp_acc1/4_shot"}
    # images of the test split once, for both tasks; those of training beside them
    assert len(list((output / "features").glob("noise-*"))) == 2
    assert len(list((output / "features").glob("noise_train-*"))) == 1

    def with_train(labels: Sequence[int]) -> None:
        shutil.rmtree(data / "train")
        write_labelled(data / "train", images[: len(labels)], labels)

    def not_loaded(*_: object) -> InferenceModel:
        raise AssertionError("what cannot work is refused at the start")

    monkeypatch.setattr(program, "load_any_model", not_loaded)
    for labels, task, message in (
        ([0] * 8, "linear_probe", r"training split of noise has no sample of class 1 \(strong\)"),
        (
            [0, 1],
            "linear_probe",
            "noise has 2 training samples, a fifth of which is none to choose",
        ),
        ([1, 1, 1, 1, 0], "few_shot", r"few_shot has no sample of class 0 \(faint\) of noise to draw"),
    ):
        with_train(labels)
        with pytest.raises(UserError, match=message):
            program.main(["--checkpoint", "x", *arguments, "--tasks", task])


def test_one_set_that_cannot_be_evaluated_costs_no_other(
    tmp_path: Path,
    model: InferenceModel,
    images: list[ImageFile],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images[2].path.write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    broken = classification_set(tmp_path / "broken", [*images[:2], ImageFile.whole(images[2].path), *images[3:]])
    images[2].path.write_bytes(b"no picture")
    other = classification_set(tmp_path / "other", [*images[:2], ImageFile.whole(images[2].path), *images[3:]])
    sound = retrieval_set(tmp_path / "sound", images[3:])
    arguments = ("--data", str(broken), str(sound), str(other), "--output", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"2\.png in .*broken/test/0\.tar does not decode"):
        run_program(monkeypatch, model, *arguments)
    assert re.search(r"^error: 2\.png in .*other/test/0\.tar does not decode", capsys.readouterr().err, re.MULTILINE)
    assert [result.dataset for result in read_results(tmp_path / "out" / "results.jsonl")] == ["sound"]


def test_a_results_file_that_cannot_be_kept_is_refused_at_the_start(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = retrieval_set(tmp_path / "pictures", images)
    (tmp_path / "results.jsonl").write_text("a note\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 1 is not a result"):
        run_program(monkeypatch, model, "--data", str(data), "--output", str(tmp_path))
    assert not (tmp_path / "features").exists()
