"""Models of other libraries, by way of our exports: the same features, or one line on what does not fit."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_forms import (
    OPEN_CLIP_FILES,
    TRANSFORMERS_FOLDERS,
    numbers,
    write_open_clip,
    write_parts,
    write_transformers,
)
from safetensors.torch import load_file, save_file
from saved_runs import save_run, synthetic_merges
from torch import Tensor

from formats.errors import UserError
from model.clip import CLIP
from pipeline.data.captions import load_tokenizer
from pipeline.export import main as export
from pipeline.foreign import open_clip_folder, transformers_folder
from pipeline.inference import load_any_model
from pipeline.ranks import Ranks
from pipeline.training.weights.start_weights import load_start_weights

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=CPU)


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_merges(tmp_path_factory.mktemp("merges") / "merges.gz", count=1000)


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


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {library: exported(run, library, folder / library) for library in ("open_clip", "transformers")}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of open_clip's weights of the size that names stand for, nothing beside it; and its merges."""
    folder = tmp_path_factory.mktemp("bare")
    merges = synthetic_merges(folder / "merges.gz")
    run = save_run(folder / "run", load_tokenizer(str(merges), 77))
    file = exported(run, "open_clip", folder / "model") / "open_clip_model.safetensors"
    return file.rename(folder / "weights.safetensors"), merges


@pytest.mark.parametrize("form", [*OPEN_CLIP_FILES, *TRANSFORMERS_FOLDERS])
def test_every_form_of_the_weights_is_evaluated_and_trained_from(
    form: str, run: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    if form in OPEN_CLIP_FILES:
        source = write_open_clip(form, exports["open_clip"], tmp_path / "theirs")
        for name in ("merges.txt", "vocab.json"):
            shutil.copy(exports["open_clip"] / name, source.parent)
    else:
        source = write_transformers(form, exports["transformers"], tmp_path / "theirs")
    ours, theirs = load_any_model(str(run), CPU), load_any_model(str(source), CPU)
    assert theirs.tokenizer.encode("a red square") == ours.tokenizer.encode("a red square")
    started = CLIP(ours.clip.config)
    sha256 = load_start_weights(started, str(source), ours.tokenizer, ALONE)
    assert sha256 == theirs.weights_sha256
    for name, value in ours.clip.state_dict().items():
        assert torch.equal(theirs.clip.state_dict()[name], value), name
        assert torch.equal(started.state_dict()[name], value), name


def test_the_code_of_an_archive_never_runs(tmp_path: Path) -> None:
    """What stands in its place in a pickle is made into nothing that acts."""

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        archive.writestr("bomb/constants.pkl", pickle.dumps(Bomb(), protocol=2))
        archive.writestr("bomb/data.pkl", pickle.dumps({"visual.conv1.weight": Bomb()}, protocol=2))
    with pytest.raises(UserError, match="holds something else than the weights of one model"):
        load_any_model(str(tmp_path / "bomb.pt"), CPU)
    assert not (tmp_path / "ran").exists()


def test_weights_of_the_sigmoid_loss(merges: Path, tmp_path: Path) -> None:
    """They are evaluated; training from them needs that loss, and that loss may begin from weights without a bias."""
    tokenizer = load_tokenizer(str(merges), 77)
    ours = load_any_model(str(save_run(tmp_path / "run", tokenizer, logit_bias=-9.5)), CPU)
    biased = exported(tmp_path / "run", "open_clip", tmp_path / "biased")
    change(biased / "open_clip_config.json", "model_cfg", "init_logit_bias", value=None)
    theirs = load_any_model(str(biased), CPU)
    assert theirs.clip.state_dict()["logit_bias"].item() == -9.5
    assert torch.equal(theirs.clip.visual.proj, ours.clip.visual.proj)
    softmax = CLIP(replace(ours.clip.config, init_logit_bias=None))
    with pytest.raises(UserError, match=r"has a logit_bias, which is of the sigmoid loss: set loss.kind=sigmoid"):
        load_start_weights(softmax, str(biased), tokenizer, ALONE)
    sigmoid = CLIP(replace(ours.clip.config, init_logit_bias=-10.0))
    for library in ("open_clip", "transformers"):
        plain = exported(save_run(tmp_path / f"run_{library}", tokenizer), library, tmp_path / library)
        load_start_weights(sigmoid, str(plain), tokenizer, ALONE)
        assert sigmoid.state_dict()["logit_bias"].item() == -10.0
        assert torch.equal(sigmoid.visual.proj, load_any_model(str(plain), CPU).clip.visual.proj)


def test_files_of_openais_form_have_quick_gelu(bare: tuple[Path, Path], tmp_path: Path) -> None:
    weights, merges = bare
    file = tmp_path / "openai.pt"
    torch.save(load_file(weights) | numbers(int), file)
    with pytest.raises(UserError, match="say which it is with --model"):
        load_any_model(str(file), CPU, str(merges))
    with pytest.raises(UserError, match="has QuickGELU: --model ViT-test-8-quickgelu"):
        load_any_model(str(file), CPU, str(merges), "ViT-test-8")
    found = load_any_model(str(file), CPU, str(merges), "ViT-test-8-quickgelu")
    assert found.clip.config.activation == "quick_gelu"
    with pytest.raises(UserError, match=r"has QuickGELU: set model\.activation=quick_gelu"):
        load_start_weights(CLIP.from_name("ViT-test-8"), str(file), found.tokenizer, ALONE)
    load_start_weights(CLIP(found.clip.config), str(file), found.tokenizer, ALONE)


def test_two_folders_of_the_same_weights_have_features_of_their_own(exports: dict[str, Path], tmp_path: Path) -> None:
    """Their configurations differ, and so do their features: one must not pass for the other."""
    identities = {load_any_model(str(exports["open_clip"]), CPU).identity.settings_sha256}
    for number, (keys, value) in enumerate(
        [(("preprocess_cfg", "resize_mode"), "squash"), (("model_cfg", "quick_gelu"), True)]
    ):
        folder = shutil.copytree(exports["open_clip"], tmp_path / str(number) / "open_clip")
        change(folder / "open_clip_config.json", *keys, value=value)
        identities.add(load_any_model(str(folder), CPU).identity.settings_sha256)
    assert len(identities) == 3


PIXELS = {"size": {"shortest_edge": 32}, "crop_size": 32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_center_crop": False}, "resized on the shorter side and not cropped"),
        ({"crop_size": 30}, "resized to 32 and cropped to 30, and the model takes 32"),
        ({"crop_size": None}, "resized to 32 and cropped to 224"),  # their default
        ({"size": {"shortest_edge": 30}}, "resized to 30 and cropped to 32"),
        ({"size": {"height": 32, "width": 40}}, "size is .*, not the side of a square"),
        ({"size": {"shortest_edge": 32, "longest_edge": 40}}, "size is .*, not the side of a square"),
        ({"size": {"longest_edge": 32}}, "size is .*, not the side of a square"),
        ({"resample": 0}, "resample 0"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*, not a number for each channel"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .*, not a positive number for each channel"),
        ({"image_mean": "0.5"}, "image_mean is 0.5, not a number"),
        ({"image_processor_type": "ViTImageProcessor"}, "its processor is ViTImageProcessor"),
        ({"do_flip_channel_order": True}, "its processor has do_flip_channel_order True"),
        ([], "'list' object has no attribute"),
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessing_that_cannot_be_honoured_is_refused(file: str, fields: Any, message: str, tmp_path: Path) -> None:
    content: Any = PIXELS | fields if isinstance(fields, dict) else fields
    (tmp_path / file).write_text(json.dumps(content if file[3] == "p" else {"image_processor": content}))
    with pytest.raises(UserError, match=rf"{file} asks for images that cannot be made here: .*{message}") as caught:
        transformers_folder.read_preprocessing(tmp_path, 32)
    assert "\n" not in str(caught.value)


def test_both_files_of_a_processor_are_read(tmp_path: Path) -> None:
    plain, nested = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    default = transformers_folder.read_preprocessing(tmp_path, 32)
    plain.write_text(json.dumps(PIXELS))
    nested.write_text(json.dumps({"processor_class": "CLIPProcessor"}))  # names of classes alone, as before version 5
    assert transformers_folder.read_preprocessing(tmp_path, 32) == replace(default, resized=32)
    nested.write_text(json.dumps({"image_processor": PIXELS | {"image_mean": 0.5}}))
    with pytest.raises(UserError, match=r"processor_config.json and preprocessor_config.json of .* differ"):
        transformers_folder.read_preprocessing(tmp_path, 32)
    plain.unlink()
    assert transformers_folder.read_preprocessing(tmp_path, 32).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"interpolation": "nearest"},
        {"resize_mode": "pad"},
        {"fill_color": "grey"},
        {"mode": "BGR"},
        {"mean": [0.5]},
        {"std": 0.0001, "crop_pct": 0.9},
    ],
)
def test_preprocessing_that_open_clip_does_not_have_either(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(fields))):
        open_clip_folder.read_preprocessing({"preprocess_cfg": fields}, 32)


def change(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    fields = content
    for key in keys[:-1]:
        fields = fields[key]
    fields[keys[-1]] = value
    file.write_text(json.dumps(content))


Damage = Callable[[Path], object]


def change_weights(file: Path, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(changed(load_file(file)), file)


def as_torch_file(folder: Path, changed: Callable[[Tensor], Tensor]) -> None:
    weights = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({name: changed(value) for name, value in weights.items()}, folder / "open_clip_pytorch_model.bin")


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
            "open_clip",
            lambda f: change(f / "open_clip_config.json", "model_cfg", "text_cfg", "proj_bias", value=True),
            "text_cfg has proj_bias True",
        ),
        (
            "open_clip",
            lambda f: change(f / "open_clip_config.json", "model_cfg", "vision_cfg", "image_size", value=[32, 64]),
            r"image_size is \[32, 64\], not the side of a square",
        ),
        ("open_clip", lambda f: (f / "open_clip_config.json").write_text("[]"), "does not describe a model"),
        (
            "open_clip",
            lambda f: change(f / "open_clip_config.json", "model_cfg", "text_cfg", "context_length", value="16"),
            "context_length is '16', not a whole number above 0",
        ),
        (
            "transformers",
            lambda f: change(f / "config.json", "text_config", "num_hidden_layers", value=0),
            "layers is 0, not a whole number above 0",
        ),
        (
            "transformers",
            lambda f: change(f / "preprocessor_config.json", "do_normalize", value="false"),
            "do_normalize is 'false', not true or false",
        ),
        (
            "open_clip",
            lambda f: change_weights(
                f / "open_clip_model.safetensors", lambda w: w | {f"module.{n}": 2 * v for n, v in w.items()}
            ),
            "more than the weights of one model: .* comes twice",
        ),
        (
            "transformers",
            lambda f: change_weights(f / "model.safetensors", lambda w: {n: v.to(torch.int8) for n, v in w.items()}),
            "is torch.int8: quantised weights are not read",
        ),
        (
            "transformers",
            lambda f: change_weights(f / "model.safetensors", lambda w: w | {"logit_scale": w["logit_scale"] / 0}),
            "logit_scale is not finite",
        ),
        ("open_clip", lambda f: as_torch_file(f, lambda value: value.to("meta")), "meta device, without values"),
        ("open_clip", lambda f: as_torch_file(f, lambda value: value.to_sparse()), "has the layout torch.sparse_coo"),
        ("open_clip", lambda f: (f / "open_clip_model.safetensors").unlink(), "give its file of weights"),
        ("transformers", lambda f: (f / "model.safetensors").unlink(), "give its file of weights"),
        (
            "transformers",
            lambda f: (write_parts(f, "model.safetensors", save_file), next(f.glob("*-00002-of*")).unlink()),
            "is missing, which model.safetensors.index.json names: copy all parts",
        ),
        (
            "transformers",
            lambda f: (
                (f / "model.safetensors").unlink(),
                (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
            ),
            "is not an index of weights",
        ),
        ("transformers", lambda f: change(f / "config.json", "vision_config", "num_channels", value=1), "1 channels"),
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
            "embedding of 1,514 tokens and the tokenizer has 515",
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


def test_transformers_weights_need_their_configuration(exports: dict[str, Path], tmp_path: Path) -> None:
    file = Path(shutil.copy(exports["transformers"] / "model.safetensors", tmp_path))
    with pytest.raises(UserError, match=r"has transformers' weights, and no config.json beside it"):
        load_any_model(str(file), CPU)
    shutil.copy(exports["transformers"] / "config.json", tmp_path)
    with pytest.raises(UserError, match="install open_clip_torch"):  # which has the merges that CLIP publishes
        load_any_model(str(file), CPU)


def test_a_tokenizer_of_another_kind_is_refused(exports: dict[str, Path], merges: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports["transformers"], tmp_path / "model")
    for name in ("merges.txt", "vocab.json"):
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(UserError, match=r"tokenizer.json is Unigram, not CLIP's byte pairs"):
        load_any_model(str(folder), CPU)
    named = shutil.copytree(exports["open_clip"], tmp_path / "named")
    change(named / "open_clip_config.json", "model_cfg", "text_cfg", "hf_tokenizer_name", value="some/tokenizer")
    for name in ("merges.txt", "vocab.json"):
        (named / name).unlink()
    with pytest.raises(UserError, match=r"names the tokenizer some/tokenizer: put its tokenizer.json beside it"):
        load_any_model(str(named), CPU)
    for model in (folder, named):
        assert load_any_model(str(model), CPU, str(merges)).tokenizer.encoder.vocab_size == 1_514


def test_training_from_a_folder_of_other_byte_pairs_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    other = synthetic_merges(tmp_path / "other.gz", count=1000)
    lines = gzip.decompress(other.read_bytes()).decode().split("\n")
    other.write_bytes(gzip.compress("\n".join([lines[0], *reversed(lines[1:])]).encode()))
    config = load_any_model(str(exports["transformers"]), CPU).clip.config
    for folder in exports.values():
        with pytest.raises(UserError, match="was trained with other byte pairs"):
            load_start_weights(CLIP(config), str(folder), load_tokenizer(str(other), 77), ALONE)


def test_a_bare_file_needs_a_name(bare: tuple[Path, Path]) -> None:
    file, merges = map(str, bare)
    with pytest.raises(UserError, match="say which it is with --model"):
        load_any_model(file, CPU, merges)
    assert load_any_model(file, CPU, merges, "ViT-test-8").name == "ViT-test-8"
    with pytest.raises(UserError, match="is not the ViT-nano-8 that --model names"):
        load_any_model(file, CPU, merges, "ViT-nano-8")
