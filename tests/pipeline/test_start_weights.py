"""Training starts from other weights: what fits gives the same features, what does not is one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_runs import save_run, synthetic_merges

from formats.errors import UserError
from model.clip import CLIP
from model.config import CLIPConfig
from model.open_clip_weights import to_open_clip
from pipeline.data.captions import Tokenizer, load_tokenizer
from pipeline.export import main as export_main
from pipeline.inference import InferenceModel, load_for_inference
from pipeline.ranks import Ranks
from pipeline.training.run_record import RECORD
from pipeline.training.weights.start_weights import RECORD_KEY, check_start_weights, load_start_weights

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(synthetic_merges(tmp_path_factory.mktemp("merges") / "merges.gz")), 77)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, byte_pairs: Tokenizer) -> InferenceModel:
    """What the weights below are of."""
    run = save_run(tmp_path_factory.mktemp("runs") / "run", byte_pairs)
    return load_for_inference(str(run), torch.device("cpu"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, trained: InferenceModel) -> dict[str, Path]:
    """The same weights in every form that is read."""
    folder = tmp_path_factory.mktemp("sources")
    checkpoint = Path(trained.checkpoint)
    found = {"run": checkpoint.parents[1], "checkpoint": checkpoint}
    for library in ("open_clip", "transformers"):
        found[library] = folder / library
        assert export_main([str(checkpoint), "--format", library, "--output", str(found[library])]) == 0
    found["safetensors beside its config"] = found["open_clip"] / "open_clip_model.safetensors"
    theirs = to_open_clip(trained.clip.state_dict())
    found["plain pt"] = folder / "weights.pt"
    torch.save(theirs, found["plain pt"])
    found["their training checkpoint"] = folder / "epoch_3.pt"
    wrapped = {f"module.{name}": value.half() for name, value in theirs.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {}}, found["their training checkpoint"])
    return found


KINDS = ["run", "checkpoint", "open_clip", "transformers", "safetensors beside its config", "plain pt"]


def fresh(config: CLIPConfig) -> CLIP:
    torch.manual_seed(99)
    return CLIP(config).eval()


def variant(config: CLIPConfig, **fields: Any) -> CLIPConfig:
    """`image_size=64`, `context_length=20`, `pool="average"`, …, each put where it belongs."""
    of_text = {name: fields.pop(name) for name in ("context_length", "vocab_size") if name in fields}
    embed_dim, activation = fields.pop("embed_dim", config.embed_dim), fields.pop("activation", "gelu")
    vision, text = replace(config.vision, **fields), replace(config.text, **of_text)
    return replace(config, vision=vision, text=text, embed_dim=embed_dim).with_activation(activation)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_weights(kind: str, sources: dict[str, Path], trained: InferenceModel) -> None:
    clip = fresh(trained.clip.config)
    sha256 = load_start_weights(clip, str(sources[kind]), trained.tokenizer, ALONE)
    assert len(sha256) == 64
    for name, value in trained.clip.state_dict().items():
        assert torch.equal(clip.state_dict()[name], value), name


def test_half_precision_and_wrapped_names_of_a_training_checkpoint(
    sources: dict[str, Path], trained: InferenceModel
) -> None:
    clip = fresh(trained.clip.config)
    load_start_weights(clip, str(sources["their training checkpoint"]), trained.tokenizer, ALONE)
    for name, value in trained.clip.state_dict().items():
        assert torch.equal(clip.state_dict()[name], value.half().float()), name


def test_other_image_sizes_and_shorter_captions_fit(sources: dict[str, Path], trained: InferenceModel) -> None:
    config = trained.clip.config
    clip = fresh(variant(config, image_size=64, context_length=20))
    load_start_weights(clip, str(sources["run"]), trained.tokenizer, ALONE)
    tokens = trained.tokenizer.encode_batch(["a dog", "two"])
    assert tokens.shape[1] <= 20
    assert torch.equal(clip.encode_text(tokens), trained.clip.encode_text(tokens))
    # a flat image, four times as large: every patch has the content it had, and nearly the position
    small, large = (torch.full((1, 3, size, size), 0.7) for size in (32, 64))
    assert (clip.encode_image(large) * trained.clip.encode_image(small)).sum() > 0.9
    unfitted = fresh(variant(config, image_size=64))
    assert (unfitted.encode_image(large) * trained.clip.encode_image(small)).sum() < 0.9


def refused(clip: CLIP, source: Path, tokenizer: Tokenizer) -> str:
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_start_weights(clip, str(source), tokenizer, ALONE)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("kind", ["run", "open_clip", "transformers"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"activation": "quick_gelu"}, "activation gelu, and the recipe's model has quick_gelu"),
        ({"pool": "average"}, "image pooling class, and the recipe's model has average"),
        ({"heads": 4}, "image heads 2, and the recipe's model has 4"),
        ({"patch_size": 16}, "patch_embedding.weight is (32, 192), the model's is (32, 768)"),
        ({"context_length": 78}, "captions have 77 positions, fewer than the 78 of the model"),
        ({"vocab_size": 1000}, "token_embedding.weight is (49408, 32), the model's is (1000, 32)"),
        ({"embed_dim": 16}, "(32, 32), the model's is (32, 16)"),
    ],
)
def test_another_model_is_one_line(
    kind: str, fields: dict[str, Any], expected: str, sources: dict[str, Path], trained: InferenceModel
) -> None:
    message = refused(fresh(variant(trained.clip.config, **fields)), sources[kind], trained.tokenizer)
    assert expected in message
    assert str(sources[kind]) in message


def test_another_attention_of_text_is_a_note(
    sources: dict[str, Path], trained: InferenceModel, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained.clip.config
    clip = fresh(replace(config, text=replace(config.text, attention="bidirectional", pool="mean")))
    load_start_weights(clip, str(sources["run"]), trained.tokenizer, ALONE)
    printed = capsys.readouterr().out
    assert "trained with model.text_attention=causal, here it is bidirectional" in printed
    assert "trained with model.text_pool=last, here it is mean" in printed


def test_another_depth_is_one_line(sources: dict[str, Path], trained: InferenceModel) -> None:
    clip = fresh(variant(trained.clip.config, layers=3))
    for kind, layer in {"run": "resblocks.2", "plain pt": "resblocks.2", "transformers": "layers.2"}.items():
        assert layer in refused(clip, sources[kind], trained.tokenizer)


@pytest.mark.parametrize(
    ("library", "section", "change", "expected"),
    [
        (
            "open_clip",
            "model_cfg",
            {"quick_gelu": True},
            "activation quick_gelu, and the recipe's model has gelu",
        ),
        ("open_clip", "model_cfg", {"text_cfg": {"no_causal_mask": True}}, "text_cfg has no_causal_mask"),
        ("open_clip", "model_cfg", {"text_cfg": {"pool_type": "last"}}, "text_cfg has pool_type last"),
        ("open_clip", "model_cfg", {"vision_cfg": 3}, "does not describe a model"),
        ("open_clip", "model_cfg", None, "does not describe a model"),
        (
            "transformers",
            "text_config",
            {"hidden_act": "quick_gelu"},
            "towers differ: gelu for images, quick_gelu for text",
        ),
        (
            "transformers",
            "vision_config",
            {"hidden_act": None},
            "towers differ: quick_gelu for images",
        ),  # their default
        ("transformers", "vision_config", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ("transformers", "model_type", "siglip", "model_type is siglip"),
    ],
)
def test_what_the_config_beside_the_weights_contradicts_is_refused(
    library: str,
    section: str,
    change: Any,
    expected: str,
    tmp_path: Path,
    sources: dict[str, Path],
    trained: InferenceModel,
) -> None:
    name = {"open_clip": "open_clip_config.json", "transformers": "config.json"}[library]
    for file in sources[library].iterdir():
        (tmp_path / file.name).symlink_to(file)
    content = json.loads((tmp_path / name).read_text())
    if isinstance(change, dict):
        content[section] |= change
        content[section] = {key: value for key, value in content[section].items() if value is not None}
    else:
        content[section] = change
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(json.dumps(content))
    message = refused(fresh(trained.clip.config), tmp_path, trained.tokenizer)
    assert expected in message
    assert name in message


def test_another_tokenizer_is_refused_even_at_the_same_size(
    tmp_path: Path, tokenizer_file: Path, sources: dict[str, Path], trained: InferenceModel
) -> None:
    pieces = load_tokenizer(str(tokenizer_file), 77)
    clip = fresh(trained.clip.config)
    assert "was trained with another tokenizer" in refused(clip, sources["run"], pieces)
    for kind in ("plain pt", "transformers"):
        assert "use data.tokenizer=clip-bpe" in refused(clip, sources[kind], pieces)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("unpickled",)


def test_files_that_are_not_weights(tmp_path: Path, sources: dict[str, Path], trained: InferenceModel) -> None:
    clip, tokenizer = fresh(trained.clip.config), trained.tokenizer
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"state_dict": Bomb()}, tmp_path / "zipped.pt")
    for name in ("bomb.pt", "zipped.pt"):
        message = refused(clip, tmp_path / name, tokenizer)
        assert "is not a plain file of tensors: it holds _pytest.outcomes._Fail; nothing else is unpickled" in message
    (tmp_path / "cut.safetensors").write_bytes(sources["safetensors beside its config"].read_bytes()[:1000])
    assert "cannot be read" in refused(clip, tmp_path / "cut.safetensors", tokenizer)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds something else" in refused(clip, tmp_path / "list.pt", tokenizer)
    save_file({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    assert "no visual.conv1.weight" in refused(clip, tmp_path / "resnet.safetensors", tokenizer)
    theirs = load_file(sources["safetensors beside its config"])
    save_file(theirs | {"positional_embedding": torch.zeros(5)}, tmp_path / "flat.safetensors")
    assert "does not fit" in refused(clip, tmp_path / "flat.safetensors", tokenizer)
    assert "no weights at" in refused(clip, tmp_path / "absent.pt", tokenizer)
    (tmp_path / "empty").mkdir()
    assert "holds no complete checkpoint" in refused(clip, tmp_path / "empty", tokenizer)


def test_a_resumed_run_is_held_to_its_start(tmp_path: Path, sources: dict[str, Path], trained: InferenceModel) -> None:
    source = tmp_path / "copy.pt"
    source.write_bytes(sources["plain pt"].read_bytes())
    sha256 = load_start_weights(fresh(trained.clip.config), str(source), trained.tokenizer, ALONE)
    run = tmp_path / "run"
    run.mkdir()
    (run / RECORD).write_text(json.dumps({RECORD_KEY: sha256}))
    assert check_start_weights(run, str(source), ALONE) == sha256
    with pytest.raises(UserError, match=r"was started from weights with .*, now model\.start_from= is no weights"):
        check_start_weights(run, "", ALONE)
    with pytest.raises(UserError, match=rf"was started from weights with sha256 {sha256[:12]}"):
        check_start_weights(run, str(sources["transformers"]), ALONE)
    source.unlink()  # training does not need it any more
    assert check_start_weights(run, str(source), ALONE) == sha256

    (run / RECORD).write_text("{}")  # a run of before there was such an option
    assert check_start_weights(run, "", ALONE) == ""
    with pytest.raises(UserError, match="was started from no weights"):
        check_start_weights(run, str(sources["plain pt"]), ALONE)
