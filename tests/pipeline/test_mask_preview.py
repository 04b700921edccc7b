"""mask-preview: its pictures show what training would do, by independent means; and every way to use it wrongly."""

from __future__ import annotations

import importlib
import io
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch import Tensor

from model.clip import CLIP
from model.config import config_from_name
from model.masking import Guidance, MaskingConfig, PatchedImages, choose_patches
from model.patches import normalize_pixels
from pipeline import mask_preview
from pipeline.data.image_sources import load_image, read_images
from pipeline.errors import UserError
from pipeline.inference import InferenceModel
from pipeline.recipe_files import load_recipe
from pipeline.reporting import preview_setting
from pipeline.reporting.mask_anatomy import Anatomy, dissect
from pipeline.reporting.mask_pictures import heat_map, outline, tint_clusters
from pipeline.reporting.preview_setting import make_setting
from pipeline.reporting.preview_sheet import Sheet, make_sheet
from pipeline.reporting.sheet_painter import paint
from pipeline.training.mask_drawer import seed_masks

SIZE, PATCH = 64, 8
TINY = ["--image-size", str(SIZE), "--patch-size", str(PATCH)]
WITHOUT_MODEL = ["none", "random", "block", "grid", "cluster", "pgs", "cluster-reference"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures: under a flat sky noise, stripes, a disc."""
    directory = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    disc = np.where(((x - 40) ** 2 + (y - 44) ** 2 < 150)[..., None], (220, 40, 30), (60, 140, 60))
    pictures = [rng.integers(0, 256, (SIZE, SIZE, 3)), np.stack([x * 37 % 200, y * 3, x + y], -1), disc]
    for number, pixels in enumerate(pictures):
        pixels[: SIZE // 2] = (120, 160, 230 - 40 * number)
        Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{number}.png")
    return directory


@pytest.fixture(scope="module")
def images_BCSS(folder: Path) -> Tensor:
    pixels = [np.array(Image.open(folder / f"{number}.png")) for number in range(3)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def busy_BCSS() -> Tensor:
    """Coarse noise under fine noise: no flat patches, and no two similarities alike."""
    generator = torch.Generator().manual_seed(1)
    coarse_BCSS = torch.nn.functional.interpolate(torch.rand(3, 3, 5, 5, generator=generator), SIZE, mode="bicubic")
    fine_BCSS = torch.rand(3, 3, SIZE, SIZE, generator=generator)
    return (200 * coarse_BCSS + 50 * fine_BCSS).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    """An untrained model that stands for a checkpoint of 64 x 64 images in patches of 8."""
    torch.manual_seed(0)
    config = config_from_name("ViT-nano-8")
    model = InferenceModel(
        clip=CLIP(replace(config, text=replace(config.text, vocab_size=16, eot_token_id=15))).eval(),
        tokenizer=None,  # type: ignore[arg-type]
        image_size=SIZE,
        name="ViT-nano-8",
        checkpoint="runs/test",
        step=7,
        samples_seen=700,
        weights_sha256="ab" * 32,
        masking=MaskingConfig(),
    )
    monkeypatch.setattr(preview_setting, "load_for_inference", lambda path, device: model)
    return "runs/test"


def sheet_of(folder: Path, strategies: list[str], show: str = "clusters", checkpoint: str | None = None) -> Sheet:
    setting = make_setting(load_recipe("base"), strategies, checkpoint, PATCH, SIZE, seed=3, progress=1.0)
    samples = read_images(folder)
    return make_sheet(setting, samples, torch.stack([load_image(sample.image, SIZE) for sample in samples]), show)


def dropped_by_training(images_BCSS: Tensor, masking: MaskingConfig, guidance: Guidance | None = None) -> Tensor:
    """What the first step of a run with seed 3 drops, bool [B, L]."""
    generator = torch.Generator()
    seed_masks(generator, seed=3, step=0, micro_batch=0, rank=0)
    kept = choose_patches(PatchedImages(images_BCSS, PATCH), masking, generator, guidance).selection.kept_K.tolist()
    return torch.tensor([patch not in kept for patch in range(3 * 64)]).view(3, 64)


def changed_patches(before: Image.Image, after: Image.Image) -> Tensor:
    """Which of 8 x 8 patches of two pictures differ by more than a few grey levels, bool [64]."""
    difference = np.abs(np.asarray(before, dtype=float) - np.asarray(after, dtype=float)).mean(axis=2)
    side = difference.shape[0] // 8
    return torch.from_numpy(difference.reshape(8, side, 8, side).mean(axis=(1, 3)).flatten() > 8)


@pytest.mark.parametrize("strategy", WITHOUT_MODEL)
def test_grey_patches_are_those_that_training_drops(strategy: str, folder: Path, images_BCSS: Tensor) -> None:
    dropped_BL = dropped_by_training(images_BCSS, MaskingConfig(strategy))
    sheet = sheet_of(folder, ["random", strategy] if strategy != "random" else ["random"])
    for row, dropped_L in zip(sheet.rows, dropped_BL, strict=True):
        assert torch.equal(changed_patches(row.cells[0].picture, row.cells[-1].picture), dropped_L)
        assert row.cells[-1].note == f"{100 * dropped_L.float().mean():.1f} % dropped"


def test_strategies_that_look_through_a_model(folder: Path, images_BCSS: Tensor, checkpoint: str) -> None:
    visual = preview_setting.load_for_inference(checkpoint, torch.device("cpu")).clip.visual
    copy = preview_setting.class_attention(visual, PatchedImages(images_BCSS, PATCH))
    dropped_BL = dropped_by_training(
        images_BCSS, MaskingConfig("attentive"), Guidance(class_attention=lambda images: copy)
    )
    sheet = sheet_of(folder, ["attentive"], checkpoint=checkpoint)
    assert [cell.label for cell in sheet.rows[0].cells] == ["original", "attentive"]
    for row, dropped_L, attention_L in zip(sheet.rows, dropped_BL, copy, strict=True):
        drawn_L = changed_patches(row.cells[0].picture, row.cells[1].picture)
        assert torch.equal(drawn_L, dropped_L)
        assert attention_L[drawn_L].max() <= attention_L[~drawn_L].min()


def assert_threshold_explains(anatomy: Anatomy) -> None:
    assert anatomy.clusters
    score_BL = anatomy.clusters.score_BL
    assert math.isfinite(anatomy.threshold)
    assert bool(anatomy.dropped_BL[score_BL > anatomy.threshold + 1e-5].all())
    assert not bool(anatomy.dropped_BL[score_BL < anatomy.threshold - 1e-5].any())
    assert (score_BL - anatomy.threshold).abs().gt(1e-5).float().mean() > 0.95


# within such bounds nothing but the threshold decides
WIDE = MaskingConfig(anchor_ratio=0.1, min_mask_ratio=0.0, max_mask_ratio=0.99)


@pytest.mark.parametrize("strategy", ["cluster", "pgs"])
def test_clusters_are_those_by_which_the_mask_was_made(strategy: str, busy_BCSS: Tensor) -> None:
    assert_threshold_explains(dissect(PatchedImages(busy_BCSS, PATCH), replace(WIDE, strategy=strategy), seed=5))


def test_clusters_by_patch_embeddings(busy_BCSS: Tensor) -> None:
    weight_DP = torch.randn(16, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(progress=1.0, embed=lambda patches_BLP: patches_BLP @ weight_DP.T)
    mixed = dissect(PatchedImages(busy_BCSS, PATCH), replace(WIDE, embedding_mix=1.0), 0, guidance)
    assert_threshold_explains(mixed)
    assert mixed.clusters
    for image, anchors_A, similarity_L in zip(
        busy_BCSS, mixed.clusters.anchors_BA, mixed.clusters.similarity_BL, strict=True
    ):
        embedded_LD = PatchedImages(image[None], PATCH).patches()[0] @ weight_DP.T
        cosines = [torch.cosine_similarity(embedded_LD[[anchor]], embedded_LD).numpy() for anchor in anchors_A.tolist()]
        np.testing.assert_allclose(similarity_L.numpy(), np.max(cosines, axis=0), atol=1e-5)


def test_each_patch_is_in_the_cluster_of_the_anchor_it_correlates_with_most(busy_BCSS: Tensor) -> None:
    clusters = dissect(PatchedImages(busy_BCSS, PATCH), WIDE, seed=0).clusters
    assert clusters
    pixels = normalize_pixels(busy_BCSS)[0].numpy()
    patches = [pixels[:, y : y + 8, x : x + 8].flatten() for y in range(0, SIZE, 8) for x in range(0, SIZE, 8)]
    anchors = [patches[anchor] for anchor in clusters.anchors_BA[0].tolist()]
    for number, patch in enumerate(patches):
        correlations = [np.corrcoef(anchor, patch)[0, 1] for anchor in anchors]
        assert clusters.nearest_BL[0, number] == int(np.argmax(correlations))
        assert clusters.similarity_BL[0, number].item() == pytest.approx(max(correlations), abs=1e-5)


def test_labels_by_what_is_shown(folder: Path) -> None:
    def labels(show: str) -> list[str]:
        return [cell.label for cell in sheet_of(folder, ["random", "cluster", "pgs"], show).rows[0].cells]

    assert labels("masks") == ["original", "random", "cluster", "pgs"]
    assert labels("clusters") == [
        *["original", "random", "cluster: clusters", "cluster"],
        *["pgs: edges", "pgs: clusters", "pgs"],
    ]
    assert labels("steps") == [
        *["original", "random", "cluster: anchors", "cluster: similarity", "cluster: clusters", "cluster"],
        *["pgs: edges", "pgs: candidates", "pgs: similarity", "pgs: clusters", "pgs"],
    ]


def test_tint_outline_and_heat() -> None:
    grey_CSS = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    tinted = tint_clusters(grey_CSS, torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 1.0, 0.5, -0.2]), 16)
    first, second, weaker, none = (
        tinted[:, y : y + 16, x : x + 16].flatten(1).unique(dim=1) for y in (0, 16) for x in (0, 16)
    )
    assert first.shape == second.shape == weaker.shape == (3, 1)
    assert none.flatten().tolist() == [100, 100, 100]
    away = [(colour.float() - 100).abs().max() for colour in (first, weaker)]
    assert away[0] > 1.8 * away[1] > 20
    assert (first.float() - second.float()).abs().max() > 50

    framed = outline(grey_CSS, torch.tensor([1, 2]), 16) != grey_CSS
    assert framed.any(dim=0)[:16, 16:].any()
    assert not framed[:, :16, :16].any()
    assert not framed[:, 16:, 16:].any()
    assert not framed[:, 4:12, 20:28].any()  # the anchor itself is seen within its frame

    cold, middle, hot, below = (
        heat_map(grey_CSS, torch.tensor([0.0, 0.3, 1.0, -1.0]), 0.3, 16)[:, ::16, ::16].flatten(1).T
    )
    assert int(cold[2]) - int(cold[0]) > 80
    assert int(hot[0]) - int(hot[2]) > 80
    assert middle.unique().numel() == 1
    assert torch.equal(cold, below)


def shows_text(picture: Image.Image, text: str, ink: str, font: ImageFont.FreeTypeFont) -> bool:
    """Whether the text, drawn anew, is somewhere in the picture, pixel by pixel."""
    paper = Image.new("RGB", (900, 60), "white")
    ImageDraw.Draw(paper).text((5, 5), text, ink, font)
    drawn = np.asarray(paper.crop(ImageChops.invert(paper).getbbox()))
    pixels, (height, width, _) = np.asarray(picture), drawn.shape
    for top in range(pixels.shape[0] - height + 1):
        row, start = pixels[top].tobytes(), -1
        while (start := row.find(drawn[0].tobytes(), start + 1)) >= 0:
            left = start // 3
            if np.array_equal(pixels[top : top + height, left : left + width], drawn):
                return True
    return False


def test_words_of_the_sheet_are_in_its_picture(folder: Path) -> None:
    sheet = sheet_of(folder, ["random", "cluster"], "masks")
    picture = paint(sheet)
    font = ImageFont.load_default(19)  # pictures are drawn at 256 pixels, four times their size
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert sheet.rows[0].cells[2].note != sheet.rows[1].cells[2].note
    for text in ("original", "random", "cluster", *map(str, sheet.summaries)):
        assert shows_text(picture, text, "#1c2129", font), text
    for text in ("Patches of 8 x 8 on images of 64 x 64;", *(cell.note for row in sheet.rows for cell in row.cells)):
        assert shows_text(picture, text, "#5b6472", font), text
    assert not shows_text(picture, "clusters", "#1c2129", font)


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
    assert len(addresses) == 7
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
    assert "4.png does not decode: 20000 x 10 pixels is over the limit" in skipped[1]


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


def test_a_sheet_that_is_too_large(folder: Path) -> None:
    sheet = sheet_of(folder, ["random"])
    with pytest.raises(UserError, match=r"a sheet of .* pixels is too large: take fewer --images"):
        paint(replace(sheet, rows=sheet.rows * 100))


def test_a_checkpoint_has_sizes_of_its_own(folder: Path, tmp_path: Path, checkpoint: str) -> None:
    arguments = [str(folder), "--checkpoint", checkpoint, "--output", str(tmp_path / "a.png")]
    assert mask_preview.main([*arguments, "--strategies", "attentive,cluster", "masking.embedding_mix=0.5"]) == 0
    with pytest.raises(UserError, match="trained with --patch-size 8, not 16"):
        mask_preview.main([*arguments, "--patch-size", "16"])


def test_as_a_program(folder: Path, tmp_path: Path, launch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    output = tmp_path / "a.jpg"
    done = launch("pipeline/mask_preview.py", str(folder), *TINY, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output.resolve())
    (tmp_path / "empty").mkdir()
    failed = launch("pipeline/mask_preview.py", str(tmp_path / "empty"), "--output", str(output))
    assert failed.returncode == 2
    assert re.fullmatch(r"error: no images in .*empty: expected .*\n", failed.stderr)
