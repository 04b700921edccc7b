"""Evaluation from files to results.jsonl, with an untrained model and a tokenizer of letters."""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from model.clip import CLIP
from model.config import config_from_name
from model.masking import MaskingConfig
from model.patches import normalize_pixels
from pipeline import evaluate as program
from pipeline import report
from pipeline.data.image_transform import decode_image, resize_center_crop
from pipeline.errors import UserError
from pipeline.evaluation.composition_files import CompositionSample, CompositionSet
from pipeline.evaluation.datasets import (
    ClassificationSample,
    ClassificationSet,
    EvaluationSet,
    RetrievalSample,
    RetrievalSet,
    open_evaluation_set,
)
from pipeline.evaluation.feature_store import Collection, FeatureStore
from pipeline.evaluation.features import FeatureEncoder, consecutive, distinct
from pipeline.evaluation.jobs import encode_slice, make_job, read_jobs, score_job
from pipeline.evaluation.results import Result, Scores, format_table, read_results, write_results
from pipeline.evaluation.slices import Slice
from pipeline.evaluation.tar_samples import ImageFile
from pipeline.files import write_atomically
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


class LetterTokenizer:
    """One token per letter; the end token is the largest id."""

    end_token_id = 127
    sha256 = "cd" * 32

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


class OneAfterAnother(Ranks):
    """A rank whose peers run at other times: it waits for none."""

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None: ...


def encoder_of(model: InferenceModel, rank: int = 0, world_size: int = 1) -> FeatureEncoder:
    return FeatureEncoder(model, OneAfterAnother(rank, rank, world_size, CPU), workers=2)


def encode(encoder: FeatureEncoder, items: Sequence[ImageFile] | Sequence[str], batch_size: int = 3) -> Tensor:
    """Features of items by way of a store."""
    kind = "texts" if isinstance(items[0], str) else "images"
    with tempfile.TemporaryDirectory() as output:
        store = FeatureStore(Path(output), Collection("some", kind, items), {"name": "m"}, batch_size)
        encoder.encode(store, Slice())
        return store.load()[0].clone()


def scores_of(model: InferenceModel, dataset: EvaluationSet, output: Path) -> Scores:
    job = make_job(model.identity, output, dataset, None, batch_size=3, masking=None)
    encode_slice(job, encoder_of(model), Slice(), output)
    (result,) = score_job(job, output)
    return Scores(result.metrics, result.chance, result.samples, result.template_sha256)


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
    torch.testing.assert_close(encode(encoder_of(model), images), expected_ND)


def test_masked_features_depend_on_the_image_alone(model: InferenceModel, images: list[ImageFile]) -> None:
    masking = MaskingConfig(strategy="cluster", target_mask_ratio=0.5)
    masking_encoder = replace(encoder_of(model), masking=masking)
    masked = encode(masking_encoder, images)
    in_other_batches = encode(masking_encoder, images[::-1], batch_size=8)
    torch.testing.assert_close(masked, in_other_batches.flip(0))
    assert masked.norm(dim=1) == pytest.approx(torch.ones(8))
    whole = encode(encoder_of(model), images)
    assert (masked - whole).abs().max() > 1e-3
    nothing_hidden = encode(replace(encoder_of(model), masking=MaskingConfig(strategy="none")), images)
    torch.testing.assert_close(nothing_hidden, whole)


def test_text_features_do_not_depend_on_the_batch(model: InferenceModel) -> None:
    texts = ["a", "a red square", "three discs left of a cross", "b", "a red square"]
    one_by_one = encode(encoder_of(model), texts, batch_size=1)
    torch.testing.assert_close(encode(encoder_of(model), texts, batch_size=4), one_by_one)
    assert one_by_one.norm(dim=1) == pytest.approx(torch.ones(5))


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 4))
def test_shares_of_slices_and_ranks_follow_one_another(total: int, count: int, world_size: int) -> None:
    shares = [
        Slice(index, count).share(total, Ranks(rank, rank, world_size, CPU))
        for index in range(count)
        for rank in range(world_size)
    ]
    assert [item for share in shares for item in share] == list(range(total))


@given(st.sets(st.integers(0, 60)), st.integers(1, 5))
def test_consecutive_numbers_become_ranges(numbers: set[int], longest: int) -> None:
    ranges = list(consecutive(sorted(numbers), longest))
    assert [number for part in ranges for number in part] == sorted(numbers)
    assert all(0 < len(part) <= longest for part in ranges)


def test_distinct_is_undone_by_its_index() -> None:
    items, index_N = distinct(["b", "a", "b", "c", "a"])
    assert items == ["b", "a", "c"]
    assert [items[index] for index in index_N] == ["b", "a", "b", "c", "a"]


def test_an_image_that_does_not_decode_stops_the_evaluation(model: InferenceModel, images: list[ImageFile]) -> None:
    images[5].path.write_bytes(b"\xff\xd8\xff\xe0 not a jpeg" + bytes(40))
    with pytest.raises(UserError, match=r"5\.png does not decode"):
        encode(encoder_of(model), [*images[:5], ImageFile.whole(images[5].path)])


def test_features_that_are_not_finite_stop_the_evaluation(model: InferenceModel, images: list[ImageFile]) -> None:
    broken = CLIP(model.clip.config)
    with torch.no_grad():
        broken.visual.proj.fill_(torch.nan)
    with pytest.raises(UserError, match=r"step_7 gives features that are not finite for 8 of 8 images"):
        encode(encoder_of(replace(model, clip=broken)), images)


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


def run_program(monkeypatch: pytest.MonkeyPatch, model: InferenceModel, *arguments: str) -> int:
    monkeypatch.setattr(program, "load_any_model", lambda path, device, tokenizer, name: model)
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
        encode(replace(encoder_of(model), ranks=FailingElsewhere(0, 0, 1, CPU)), images)


def retrieval_set(directory: Path, images: Sequence[ImageFile]) -> Path:
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


def measured(line: str) -> str:
    return json.dumps({name: value for name, value in json.loads(line).items() if name != "wall_time_s"})


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


@pytest.mark.slow
def test_any_slicing_gives_the_same_bytes(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], capsys: pytest.CaptureFixture[str]
) -> None:
    data = retrieval_set(tmp_path / "pictures", images)
    rng = random.Random(5)
    outcomes = set()
    for trial in range(100):
        output = tmp_path / f"out{trial}"
        job = make_job(model.identity, data, open_evaluation_set(data), None, batch_size=2, masking=None)
        count = rng.randint(1, 6)
        world_size = rng.randint(1, 3)
        order = [(index, rank) for index in range(count) for rank in range(world_size)]
        rng.shuffle(order)
        for index, rank in order:
            encode_slice(job, encoder_of(model, rank, world_size), Slice(index, count), output)
        assert report.main(["collect", str(output)]) == 0
        (line,) = (output / "results.jsonl").read_text().splitlines()
        outcomes.add(measured(line))
    assert len(outcomes) == 1
    capsys.readouterr()


def test_collecting_too_early_names_what_is_missing(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = retrieval_set(tmp_path / "pictures", images), tmp_path / "out"
    arguments = ("--data", str(data), "--output", str(output), "--batch-size", "2")
    with pytest.raises(UserError, match="nothing to collect"):
        report.main(["collect", str(output)])
    assert run_program(monkeypatch, model, *arguments, "--slice", "0/3") == 0
    assert run_program(monkeypatch, model, *arguments, "--slice", "2/3") == 0
    with pytest.raises(UserError, match=r"2 of 8 images of pictures .*rows 2 to 3.* not ended: 1/3; run .*--slice 1/3"):
        report.main(["collect", str(output)])
    assert not (output / "results.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    # without --slice the rest is encoded, and what was there is used
    assert run_program(monkeypatch, model, *arguments) == 0
    assert before.items() < {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}.items()
    assert len((output / "results.jsonl").read_text().splitlines()) == 1


def test_pieces_that_overlap_are_no_number(tmp_path: Path, model: InferenceModel, images: list[ImageFile]) -> None:
    store = FeatureStore(tmp_path, Collection("some", "images", images), {"name": "m"}, 2)
    encoder_of(model).encode(store, Slice())
    (piece,) = store.pieces()
    store.write(1, torch.zeros(4, 64), [b"\0" * 32] * 4)
    with pytest.raises(UserError, match="there twice"):
        store.load()
    (store.directory / "000000002-000000006.safetensors").unlink()
    whole = piece.path.read_bytes()
    store.write(0, torch.full((8, 64), torch.nan), [b"\0" * 32] * 8)
    with pytest.raises(UserError, match=r"000000000-000000008\.safetensors holds features that are not finite"):
        store.load()
    piece.path.write_bytes(whole)
    piece.path.write_bytes(piece.path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        store.load()


def test_collecting_looks_at_the_set_again(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = retrieval_set(tmp_path / "pictures", images), tmp_path / "out"
    arguments = ("--data", str(data), "--output", str(output), "--batch-size", "2")
    assert run_program(monkeypatch, model, *arguments, "--slice", "0/1") == 0
    (data / "test" / "1.tar").unlink()
    with pytest.raises(UserError, match=r"missing shard .*1\.tar"):
        report.main(["collect", str(output)])
    (data / "test" / "nshards.txt").write_text("1\n")
    with pytest.raises(UserError, match="have no features yet"):  # of the set as it is now
        report.main(["collect", str(output)])
    assert len(read_jobs(output)) == 1


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "1/0"])
def test_slices_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no slice"):
        Slice.parse(text)


def test_a_sweep_file_stands_for_options(
    tmp_path: Path, model: InferenceModel, images: list[ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = retrieval_set(tmp_path / "pictures", images)
    write_composition_set(tmp_path / "crepe")
    loaded = []
    monkeypatch.setattr(program, "load_any_model", lambda path, *_: loaded.append(path) or replace(model, name=path))
    monkeypatch.setattr(program, "init_ranks", lambda: Ranks(0, 0, 1, CPU))
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


def write_labelled(split: Path, images: Sequence[ImageFile], labels: Sequence[int]) -> None:
    split.mkdir(parents=True)
    with tarfile.open(split / "0.tar", "w") as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            for name, data in ((f"{number}.png", image.read()), (f"{number}.cls", str(label).encode())):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    (split / "nshards.txt").write_text("1")


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

    write_labelled(tmp_path / "half" / "train", images, [0] * 8)
    (data / "train").rename(tmp_path / "old")
    (tmp_path / "half" / "train").rename(data / "train")
    with pytest.raises(UserError, match=r"training split of noise has no sample of class 1 \(strong\)"):
        run_program(monkeypatch, model, *arguments, "--tasks", "linear_probe")


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As ranks that begin a store at the same moment."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_atomically(tmp_path / "file", str(n % 3)), range(200)))
    assert (tmp_path / "file").read_text() in "012"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
