"""mask-preview, the program: what it writes and says; and every way to use it wrongly."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from preview_material import PATCH, SIZE, stand_in_checkpoint, write_pictures

from formats.errors import UserError
from pipeline import mask_preview

TINY = ["--image-size", str(SIZE), "--patch-size", str(PATCH)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    return stand_in_checkpoint(monkeypatch)


def run_preview(folder: Path, output: Path, *options: str) -> bytes:
    assert mask_preview.main([str(folder), *TINY, *options, "--output", str(output)]) == 0
    return output.read_bytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "html"])
def test_same_seed_same_bytes(suffix: str, folder: Path, tmp_path: Path) -> None:
    first, again, other = (
        run_preview(folder, tmp_path / f"new/{number}.{suffix}", "--images", "1", "--seed", seed)
        for number, seed in enumerate(("1", "1", "2"))
    )
    assert first == again
    assert first != other


def test_page_stands_alone_and_escapes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "in" / "a.txt").write_text("<script>alert(1)</script> & more")
    text = run_preview(tmp_path / "in", tmp_path / "a.html").decode()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(addresses) == 7 + 4  # pictures, and what is drawn how: dropped, clusters, anchors, edges
    legend = re.findall(r"<b>(.*?)</b>: (.*?)</span>", text)
    assert [label for label, _ in legend] == ["grey with lines", "colours", "frame", "blue to red"]
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    for expected in ("prefers-color-scheme: dark", "pgs: edges", "50.0 %", 'name="viewport"'):
        assert expected in text
    assert not re.search(r"url\(|@import|<link", text)


def test_a_recipe_says_what_a_run_would_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: base\nmodel: {name: ViT-tiny-8}\n"
        "masking: {strategy: block, target_mask_ratio: 0.25, final_mask_ratio: 0.75, ratio_schedule: linear}\n"
    )
    arguments = [str(folder), "--recipe", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "a.png")]
    assert mask_preview.main(arguments) == 0
    assert mask_preview.main([*arguments, "--progress", "0", "masking.strategy=grid"]) == 0
    assert mask_preview.main([*arguments, "--progress", "0.5", "--strategies", "random"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    assert [line[:14] for line in lines] == ["block: dropped", "grid: dropped ", "random: droppe"]
    assert [re.findall(r"dropped ([\d.]+)", line)[0] for line in lines] == ["75.0", "25.0", "50.0"]


def test_ratios_of_the_command_line_come_last(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_preview(folder, tmp_path / "a.png", "masking.target_mask_ratio=0.1", "--target-mask-ratio", "0.75")
    assert capsys.readouterr().out.count("dropped 75.0 %") == 3


def test_unusable_images_are_named_and_the_rest_is_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    (tmp_path / "3.jpg").write_bytes(b"\xff\xd8\xff no picture")
    Image.new("1", (20_000, 10)).save(tmp_path / "4.png")
    assert Image.open(io.BytesIO(run_preview(tmp_path, tmp_path / "out/a.png"))).height > 3 * 224
    skipped = capsys.readouterr().err.splitlines()
    assert len(skipped) == 2
    assert "3.jpg does not decode" in skipped[0]
    assert "4.png is over the limit: 20000 x 10 pixels" in skipped[1]


def test_no_usable_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of the images chosen from .* can be used"):
        run_preview(tmp_path, tmp_path / "a.png")


def test_the_console_script_is_this_program() -> None:
    declared = re.search(r'^mask-preview = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert getattr(importlib.import_module(declared[1]), declared[2]) is mask_preview.command


def test_only_images_that_are_shown_are_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(100):
        shown = number in (25, 75)
        content = (folder / "0.png").read_bytes() if shown else b"would be named as skipped"
        (tmp_path / f"{number:02d}.png").write_bytes(content)
    run_preview(tmp_path, tmp_path / "a.html", "--images", "2")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategies", "random,clutser"], "unknown strategy 'clutser': did you mean 'cluster'"),
        (
            ["--strategies", "attentive"],
            "strategy attentive looks at images through a trained model: give --checkpoint",
        ),
        (["masking.embedding_mix=0.5"], "embedding_mix looks at images through a trained model: give --checkpoint"),
        (["--image-size", "60"], "60 pixels a side are not a whole number of patches of 8: take --image-size 56 or 64"),
        (["--image-size", "4"], "take --image-size 8, or another"),
        (["--target-mask-ratio", "1.5"], r"masking.target_mask_ratio must be in \[0, 1\), not 1.5"),
        (["--min-mask-ratio", "half"], "masking.min_mask_ratio.*'half'"),
        (["--recipe", "bse"], "no recipe 'bse': did you mean 'base'"),
        (["masking.stratgy=random"], "did you mean 'masking.strategy'"),
        (["--output", "masks.gif"], r"'masks.gif'.* ends in .jpg, .jpeg, .png, .html"),
        (["--output", "masks"], "'masks'.* ends in"),
        (["--output", "."], "is a directory"),
        (["--output", "/proc/none/a.png"], "cannot write /proc/none/a.png"),
        (["--checkpoint", "nowhere"], "no run or checkpoint at nowhere"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    options: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        mask_preview.main([str(folder), "--output", "a.png", *TINY, *options])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--images", "many", "whole number from 1 to 200, not 'many'"),
        ("--images", "201", "whole number from 1 to 200, not '201'"),
        ("--image-size", "100000", "whole number from 1 to 2048, not '100000'"),
        ("--patch-size", "0", "whole number from 1 to 2048, not '0'"),
        ("--seed", "1.5", "whole number from 0 to .*, not '1.5'"),
        ("--progress", "nan", "number between 0 and 1, not 'nan'"),
        ("--progress", "half", "number between 0 and 1, not 'half'"),
    ],
)
def test_numbers_out_of_range(
    option: str, value: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        mask_preview.main([str(folder), "--output", "a.png", option, value])
    assert re.search(f"argument {option}: must be a {message}", capsys.readouterr().err)


def test_a_checkpoint_has_sizes_of_its_own(folder: Path, tmp_path: Path, checkpoint: str) -> None:
    arguments = [str(folder), "--checkpoint", checkpoint, "--output", str(tmp_path / "a.png")]
    assert mask_preview.main([*arguments, "--strategies", "attentive,cluster", "masking.embedding_mix=0.5"]) == 0
    with pytest.raises(UserError, match="trained with --patch-size 8, not 16"):
        mask_preview.main([*arguments, "--patch-size", "16"])


@pytest.mark.slow
def test_as_a_program(folder: Path, tmp_path: Path, launch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    output = tmp_path / "a.jpg"
    done = launch("pipeline/mask_preview.py", str(folder), *TINY, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output.resolve())
    (tmp_path / "empty").mkdir()
    failed = launch("pipeline/mask_preview.py", str(tmp_path / "empty"), "--output", str(output))
    assert failed.returncode == 2
    assert re.fullmatch(r"error: no images in .*empty: expected .*\n", failed.stderr)
