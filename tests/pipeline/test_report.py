"""The report from made-up runs and results: what its tables say, what its pictures show, and that it stands alone."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_material import checkpoints_of

from formats.errors import UserError
from formats.pages import data_uri
from model.masking import MaskingConfig, PatchedImages, choose_patches
from pipeline import report
from pipeline.evaluation.results import Result, write_results
from pipeline.recipe_files import parse_recipe
from pipeline.reporting.charts import draw_curves
from pipeline.reporting.inputs import read_inputs
from pipeline.reporting.masks.setting import make_setting
from pipeline.reporting.masks.sheet import load_images, make_sheet
from pipeline.reporting.tables.overview import dataset_tables, headline_table, training_table
from pipeline.training.mask_drawer import seed_masks

CHANCE = {"acc1": 0.1}
STRATEGIES = ("random", "cluster")


def result_of(run: str, acc1: float, dataset: str = "cifar10", samples: int = 1000, template: str = "ab") -> Result:
    return Result(
        model="ViT-tiny-8",
        checkpoint=f"runs/{run}/checkpoints/step_00000200",
        dataset=dataset,
        task="zeroshot_classification",
        metrics={"acc1": acc1},
        samples=samples,
        chance=CHANCE,
        template_sha256=template * 32,
        step=200,
    )


def write_run(directory: Path, strategy: str = "cluster", last_line: str = '{"step": 30, "lo') -> Path:
    directory.mkdir(parents=True)
    recipe = parse_recipe({"model": {"name": "ViT-tiny-8"}, "masking": {"strategy": strategy}}, "test")
    (directory / "recipe.yaml").write_text(recipe.to_yaml())
    steps = [{"step": step, "samples_seen": 64 * step, "loss": 4 - step / 10} for step in (10, 20)]
    steps[1] |= {"mask_ratio": 0.5, "mask_ratio_std": 0.1, "wall_time_s": 83.0, "samples_per_s": 512.0}
    lines = [json.dumps(step) for step in steps]
    (directory / "metrics.jsonl").write_text("\n".join([*lines, last_line]))
    write_results(directory / "evaluation", [result_of(directory.name, 0.25)])
    return directory


def write_images(directory: Path) -> Path:
    """A composition set of three images: half flat sky, half noise."""
    (directory / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = {}
    for index in range(3):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        pixels[:32] = (120, 160, 230)
        Image.fromarray(pixels).save(directory / "images" / f"{index}.png")
        entries[str(index)] = {"filename": f"{index}.png", "caption": f"sky <{index}>", "negative_caption": "no"}
    (directory / "swap_att.json").write_text(json.dumps(entries))
    return directory


class _Resources(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]


def test_page_stands_alone_and_shows_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "alpha"), write_run(tmp_path / "beta", "random")]
    images = write_images(tmp_path / "sky")
    assert report.main([*map(str, runs), "--output", str(tmp_path / "out"), "--images", str(images)]) == 0
    page = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page.resolve())

    text = page.read_text()
    resources = _Resources()
    resources.feed(text)
    assert resources.addresses
    assert all(address.startswith(("data:image/", "#")) for address in resources.addresses)
    assert not resources.tags & {"link", "iframe"}
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text
    for expected in ("alpha", "beta", "25.00", "10.00", "cluster, 50%", "1m23s", "prefers-color-scheme: dark"):
        assert expected in text
    contents = [address[1:] for address in resources.addresses if address.startswith("#")]
    assert contents == ["run", "results", "papers", "sets", "masks", "provenance"]
    assert all(f'id="{name}"' in text for name in contents)
    assert "<title>alpha, beta</title>" in text
    # three charts for two kinds of page, three pictures of three images, and what is drawn how
    assert len(resources.addresses) == 3 * 2 + 3 * 3 + 1 + len(contents)
    tables = ("benchmarks", "zero_shot", "training", "provenance", "set_0_cifar10")
    written = {path.name for path in (tmp_path / "out" / "tables").iterdir()}
    assert written == {f"{name}.{kind}" for name in tables for kind in ("csv", "tex")}


def test_data_from_outside_is_escaped(tmp_path: Path) -> None:
    write_results(tmp_path, [result_of("<script>alert(1)<b>", 0.5, dataset="a|b <img src=x>")])
    report.main([str(tmp_path), "--output", str(tmp_path / "out")])
    resources = _Resources()
    resources.feed((tmp_path / "out" / "report.html").read_text())
    assert not resources.tags & {"img", "b"}
    assert (tmp_path / "out" / "report.html").read_text().count("<script>") == 1  # the page's own
    assert "a\\|b \\<img src=x\\>" in (tmp_path / "out" / "report.md").read_text()


def test_markdown_tables_are_whole_and_figures_exist(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alpha")
    images = write_images(tmp_path / "sky")
    report.main([str(run), "--output", str(tmp_path / "out"), "--images", str(images)])
    text = (tmp_path / "out" / "report.md").read_text()
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = block.splitlines()
        assert len(rows) >= 3
        assert set(rows[1]) <= set("|:-")
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    figures = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(figures) == 2 + 3
    assert all((tmp_path / "out" / figure).stat().st_size for figure in figures)


def test_interrupted_and_repeated_lines_of_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alpha", last_line='{"step": 20, "samples_seen": 1280, "loss": 1.5}\n{"step": 30, "l')
    (loaded,) = read_inputs([run]).runs
    assert [step["step"] for step in loaded.steps] == [10, 20]
    assert loaded.curve("loss") == ([640, 1280], [3.0, 1.5])
    assert loaded.curve("mask_ratio") == ([], [])


def test_results_given_twice_count_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alpha")
    inputs = read_inputs([run, run / "evaluation", run / "evaluation" / "results.jsonl"])
    assert [len(checkpoint.results) for checkpoint in inputs.checkpoints] == [1]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_paths_without_results(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"nothing to report in .*{name}"):
        read_inputs([tmp_path / name])


def test_best_is_marked_and_chance_comes_last() -> None:
    (table,) = dataset_tables(checkpoints_of([result_of("a", 0.3), result_of("b", 0.4), result_of("c", 0.4)]))
    assert [row.label for row in table.rows] == ["a", "b", "c", "chance"]
    assert [row.cells[0].text for row in table.rows] == ["30.00", "40.00", "40.00", "10.00"]
    assert [row.cells[0].mark for row in table.rows] == ["second", "best", "best", ""]
    assert not table.warning


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (result_of("b", 0.4, samples=999), "numbers of samples"),
        (result_of("b", 0.4, template="cd"), "prompt templates"),
    ],
)
def test_rows_that_cannot_be_compared_are_said_to_be_so(other: Result, reason: str) -> None:
    (table,) = dataset_tables(checkpoints_of([result_of("a", 0.3), other]))
    assert reason in table.warning


def test_headlines_leave_gaps_where_a_checkpoint_was_not_evaluated() -> None:
    table = headline_table(checkpoints_of([result_of("a", 0.3), result_of("a", 0.5, "sun"), result_of("b", 0.4)]))
    assert table is not None
    assert list(map(str, table.columns)) == ["cifar10 acc1", "sun acc1"]
    assert [[cell.text for cell in row.cells] for row in table.rows[:2]] == [["30.00", "50.00"], ["40.00", ""]]
    assert headline_table(checkpoints_of([])) is None


def test_training_table_lists_recipe_and_outcome(tmp_path: Path) -> None:
    table = training_table(read_inputs([write_run(tmp_path / "alpha")]).runs)
    assert table is not None
    facts = {row.label: row.cells[0].text for row in table.rows}
    assert facts["model"] == "ViT-tiny-8"
    assert facts["samples seen"] == "1,280"
    assert facts["wall time"] == "1m23s"


def _pixels(jpeg: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))).permute(2, 0, 1).float()


def dropped_by_training(images_BCHW: torch.Tensor, masking: MaskingConfig) -> torch.Tensor:
    """Patches that the first step of a run with seed 0 drops, bool [B, L]."""
    generator = torch.Generator()
    seed_masks(generator, seed=0, step=0, micro_batch=0, rank=0)
    images = PatchedImages(images_BCHW, 8)
    kept = choose_patches(images, masking, generator).selection.kept_K.tolist()
    all_patches = range(images.num_images * images.num_patches)
    return torch.tensor([patch not in kept for patch in all_patches]).view(images.num_images, -1)


def test_stages_of_a_run_are_told_apart(tmp_path: Path) -> None:
    directory = tmp_path / "staged"
    directory.mkdir()
    fields = {
        "model": {"name": "ViT-tiny-8"},
        "stages": [
            {"name": "small", "model": {"image_size": 32}, "train": {"global_batch_size": 4096}},
            {"name": "whole", "masking": {"strategy": "none"}, "optimizer": {"lr": 1e-5}},
        ],
    }
    (directory / "recipe.yaml").write_text(parse_recipe(fields, "test").to_yaml())
    stages = ["small"] * 3 + ["whole"] * 3
    steps = [
        {"step": n, "stage": stage, "samples_seen": n, "loss": loss, "samples_per_s": speed}
        for n, (stage, loss, speed) in enumerate(
            zip(stages, (9, 8, 7, 3, 2, 1), (900, 910, 920, 90, 80, 70), strict=True)
        )
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    runs = read_inputs([directory]).runs
    assert [[step["step"] for step in stage.steps] for stage in runs[0].by_stage()] == [[0, 1, 2], [3, 4, 5]]
    table = training_table(runs)
    assert table is not None
    facts = {row.label: row.cells[0].text for row in table.rows}
    assert facts["stages"] == "small; whole"
    assert facts["images"] == "32; 64 px"
    assert facts["masking"] == "cluster, 50%; none"
    assert facts["batch"] == "4,096; 2,048 pairs"
    assert facts["learning rate"] == "0.0005; 1e-05"
    assert facts["weight decay"] == "0.2"
    assert facts["samples/s, median"] == "910; 80"
    assert facts["loss, last 5 % of the log"] == "1.000"
    curves = {curve.name: curve.light_svg for curve in draw_curves(runs)}
    single = [replace(runs[0], steps=tuple({**step, "stage": "one"} for step in runs[0].steps))]
    assert curves["loss"].count(b"stroke-dasharray") == 1  # where the stages meet
    assert draw_curves(single)[0].light_svg.count(b"stroke-dasharray") == 0


def test_a_chart_has_room_for_twelve_runs(tmp_path: Path) -> None:
    (run,) = read_inputs([write_run(tmp_path / "alpha")]).runs
    loss = draw_curves([replace(run, name=f"run_{index}") for index in range(13)])[0]
    assert "the first 12 of 13 runs" in loss.description
    assert b"run_11" in loss.light_svg
    assert b"run_12" not in loss.light_svg


def test_pictures_hide_exactly_the_patches_that_training_would_drop(tmp_path: Path) -> None:
    setting = make_setting(
        parse_recipe({"model": {"name": "ViT-tiny-8"}}, "test"), STRATEGIES, None, None, None, 0, 0.0
    )
    sheet = make_sheet(setting, *load_images(write_images(tmp_path), 8, setting.image_size), "masks")
    originals = [_pixels(row.cells[0].jpeg) for row in sheet.rows]
    images_BCHW = torch.stack(
        [torch.from_numpy(np.array(Image.open(tmp_path / "images" / f"{i}.png"))).permute(2, 0, 1) for i in range(3)]
    )
    for index, strategy in enumerate(STRATEGIES, 1):
        hidden_BL = dropped_by_training(images_BCHW, MaskingConfig(strategy=strategy))
        assert hidden_BL.float().mean() == 0.5
        for row, original, hidden_L in zip(sheet.rows, originals, hidden_BL, strict=True):
            assert row.cells[index].note == f"{100 * hidden_L.float().mean():.1f} % dropped"
            difference = (_pixels(row.cells[index].jpeg) - original).abs().mean(dim=0)
            by_patch = difference.view(8, difference.shape[0] // 8, 8, -1).mean(dim=(1, 3)).flatten()
            assert torch.equal(by_patch > 12, hidden_L)


def test_clusters_hide_the_flat_sky_first(tmp_path: Path) -> None:
    write_images(tmp_path)
    images_BCHW = torch.stack(
        [torch.from_numpy(np.array(Image.open(tmp_path / "images" / f"{i}.png"))).permute(2, 0, 1) for i in range(3)]
    )
    hidden_BL = dropped_by_training(images_BCHW, MaskingConfig(anchor_ratio=0.1))
    sky, noise = hidden_BL[:, :32].float().mean(), hidden_BL[:, 32:].float().mean()
    assert sky > 0.8
    assert noise < 0.2


def test_data_uri_round_trip() -> None:
    uri = data_uri(b"\x00\xffpicture", "image/jpeg")
    assert base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")) == b"\x00\xffpicture"
