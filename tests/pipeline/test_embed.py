"""Features of shards: each row is its picture's, whoever computes it and however often the work is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RANK_ENVIRONMENT, ROOT, write_shards
from safetensors.torch import save_file
from saved_runs import save_run

from formats.embeddings import open_embeddings
from formats.errors import UserError
from formats.manifest import read_manifest, usable_samples
from pipeline import embed
from pipeline.data.captions import load_tokenizer
from pipeline.data.image_transform import decode_image
from pipeline.foreign.dinov2 import _shapes, read_dinov2
from pipeline.inference import load_any_model

pytestmark = pytest.mark.usefixtures("one_thread", "threads_as_told")


@pytest.fixture(scope="module")
def threads_as_told() -> Iterator[None]:
    """Else a program that joins its ranks takes all cores, and with other threads torch may round otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which one picture of the second does not decode."""
    directory = tmp_path_factory.mktemp("damaged") / "shards"
    return write_shards(directory, [9, 7, 4, 5], {"00000011.jpg": b"\xff\xd8\xff\xe0 no picture"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    return save_run(tmp_path_factory.mktemp("model") / "run", load_tokenizer(str(tokenizer_file), 24))


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [f"--checkpoint={model}", f"--data={data}", f"--output={output}", "--batch-size=4", "--workers=1", *more]


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, damaged: Path) -> Path:
    output = tmp_path_factory.mktemp("whole") / "embeddings"
    assert embed.main(arguments(model, damaged, output)) == 0
    return output


def test_each_row_is_its_picture(whole: Path, model: Path, damaged: Path) -> None:
    loaded = load_any_model(str(model), torch.device("cpu"))
    manifest = read_manifest(damaged)
    embeddings = open_embeddings(whole, manifest)
    for shard in manifest.shards:
        rows_nD = embeddings.rows(shard)
        assert rows_nD.dtype == np.float16
        for sample, row_D in zip(usable_samples(damaged, shard), rows_nD, strict=True):
            if sample.key == "00000011":
                assert np.isnan(row_D).all()
                continue
            image = loaded.preprocessing(decode_image(sample.members["jpg"]))[None]
            with torch.inference_mode():
                alone = loaded.clip.encode_image(loaded.preprocessing.normalize(image), normalize=True)[0]
            np.testing.assert_allclose(row_D.astype(np.float32), alone.numpy(), atol=1e-3)
            assert np.linalg.norm(row_D.astype(np.float32)) == pytest.approx(1, abs=1e-3)
    header = json.loads((whole / "embeddings.json").read_text())
    assert header["manifest_sha256"] == manifest.sha256
    assert (header["rows"], header["width"], header["dtype"]) == (25, embeddings.width, "float16")
    assert header["weights_sha256"] == loaded.weights_sha256


def test_slices_and_what_was_there_give_the_same_bytes(
    tmp_path: Path, whole: Path, model: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "embeddings"
    assert embed.main(arguments(model, damaged, output, "--slice=0/2")) == 0
    said = capsys.readouterr().out
    assert "2 of 4 shards are still to be embedded" in said
    assert "1 pictures do not decode" in said
    kept = (output / "00001.npy").stat().st_mtime_ns
    (output / "00000.npy").write_bytes(b"half an arr")  # of a copy that broke off
    assert embed.main(arguments(model, damaged, output)) == 0
    assert "do not decode" not in capsys.readouterr().out  # that shard was there
    assert contents(output) == contents(whole)
    assert (output / "00001.npy").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path, whole: Path, model: Path, damaged: Path) -> None:
    output = tmp_path / "embeddings"
    # it stops after the first shard, in the middle of writing the second
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom formats import files\nfrom pipeline import embed\n"
        "flush = files.flush_to_disk\n"
        "def stuck(path):\n"
        "    if '00001' in path.name: Path(sys.argv[1]).touch(); time.sleep(600)\n"
        "    flush(path)\n"
        "files.flush_to_disk = stuck\nembed.main(sys.argv[2:])\n"
    )
    signal_file = tmp_path / "writing"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(signal_file), *arguments(model, damaged, output)],
        cwd=ROOT,
        env=os.environ | RANK_ENVIRONMENT,
    )
    while not signal_file.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name for path in output.glob("*.npy")} == {"00000.npy"}
    finished = (output / "00000.npy").read_bytes()
    assert embed.main(arguments(model, damaged, output)) == 0
    found = {name: content for name, content in contents(output).items() if not name.endswith(".part")}
    assert found.pop("00000.npy") == finished
    assert {**found, "00000.npy": finished} == contents(whole)


def test_a_folder_of_arrays_alone_is_taken(tmp_path: Path, damaged: Path) -> None:
    manifest = read_manifest(damaged)
    for shard in manifest.shards:
        np.save(tmp_path / shard.name.replace(".tar", ".npy"), np.ones((shard.samples, 3), np.float32))
    embeddings = open_embeddings(tmp_path, manifest)
    assert (embeddings.width, embeddings.header) == (3, {})


def test_what_does_not_fit_is_one_line(tmp_path: Path, whole: Path, model: Path, damaged: Path) -> None:
    manifest = read_manifest(damaged)
    other = write_shards(tmp_path / "other", [3])
    for directory, of, expected in [
        (whole, read_manifest(other), "of another manifest"),
        (tmp_path / "none", manifest, "is not a directory"),
        (tmp_path, manifest, r"lacks the features of 4 of 4 shards \(00000.tar, 00001.tar, 00002.tar, …\)"),
    ]:
        with pytest.raises(UserError, match=expected):
            open_embeddings(directory, of)
    with pytest.raises(UserError, match="manifest_sha256, rows differ"):
        embed.main(arguments(model, other, whole))
    arrays: list[tuple[np.ndarray, str]] = [
        (np.ones((2, 3), np.float32), "has 2 rows and .* 3 usable samples"),
        (np.ones((3, 3), np.int64), "int64 of 2 axes"),
        (np.ones(3, np.float32), "float32 of 1 axes"),
        (np.array([{}] * 3), "not an array of numbers"),
    ]
    for array, expected in arrays:
        np.save(tmp_path / "00000.npy", array, allow_pickle=True)
        with pytest.raises(UserError, match=expected):
            open_embeddings(tmp_path, read_manifest(other))


def make_dinov2(folder: Path) -> Path:
    """A tiny one with random weights."""
    folder.mkdir()
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2", **sizes}))
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}}
    crop = {"crop_size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | crop))
    generator = torch.Generator().manual_seed(0)
    given = {"encoder.layer.0.mlp.fc1.bias": torch.zeros(20), "embeddings.position_embeddings": torch.zeros(1, 17, 12)}
    shapes = _shapes(given, 1, 12, 8)
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    return folder


def test_dinov2_embeds_too(tmp_path: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_dinov2(tmp_path / "dinov2")
    assert embed.main(arguments(folder, damaged, tmp_path / "embeddings")) == 0
    assert "1 pictures do not decode" in capsys.readouterr().out
    manifest = read_manifest(damaged)
    embeddings = open_embeddings(tmp_path / "embeddings", manifest)
    assert embeddings.header["model"] == "dinov2"
    model = read_dinov2(folder, torch.device("cpu"))
    shard = manifest.shards[2]
    images = [decode_image(sample.members["jpg"]) for sample in usable_samples(damaged, shard)]
    pixels_BCHW = model.preprocessing.normalize(torch.stack([model.preprocessing(image) for image in images]))
    alone_nD = torch.nn.functional.normalize(model.encode_image(pixels_BCHW), dim=1)
    np.testing.assert_allclose(embeddings.rows(shard).astype(np.float32), alone_nD.numpy(), atol=1e-3)
