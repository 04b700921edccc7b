"""Galleries and confusion matrices, from features whose neighbours are known."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from report_material import HOSTILE, job_of, store, write_classification_set, write_retrieval_set

from pipeline.reporting.inputs import read_jobs
from pipeline.reporting.pictures import ResultPictures, draw_result_pictures, spread


def pictures_of(output: Path) -> ResultPictures:
    jobs, notes = read_jobs([output], checkpoints=())
    pictures = draw_result_pictures(jobs)
    return replace(pictures, notes=(*notes, *pictures.notes))


def write_retrieval_output(data: Path, output: Path, step: int = 20) -> None:
    """Twelve images on a circle, each with two captions: one at its own place, one a place further."""
    if not data.exists():
        write_retrieval_set(data, [[f"caption {i} a", f"caption {i} b"] for i in range(12)])
    angle_I = torch.arange(12) * torch.pi / 8
    angle_C = torch.stack((angle_I + 0.01, angle_I + torch.pi / 8), dim=1).flatten()
    images_ID, captions_CD = (torch.stack((angle.cos(), angle.sin()), dim=1) for angle in (angle_I, angle_C))
    store(job_of(data, step), output, {"images": images_ID, "captions": captions_CD})


def write_classification_output(data: Path, output: Path, class_names: list[str]) -> None:
    """Four images of each class; of class 1, three are taken for class 0."""
    num_classes = len(class_names)
    labels = [label for label in range(num_classes) for _ in range(4)]
    write_classification_set(data, class_names, labels)
    seen = [0 if label == 1 and index % 4 else label for index, label in enumerate(labels)]
    store(job_of(data), output, {"images": torch.eye(num_classes)[seen], "prompts": torch.eye(num_classes)})


def test_gallery_shows_the_nearest_and_marks_what_belongs_together(tmp_path: Path) -> None:
    write_retrieval_output(tmp_path / "pairs", tmp_path / "out")
    (gallery,) = pictures_of(tmp_path / "out").galleries
    assert "alpha, step 20" in gallery.subtitle
    assert "12 images, 24 captions" in gallery.subtitle
    for query in gallery.text_queries:
        assert len(query.hits) == 5
        is_first = query.caption.endswith("a")  # else the image a place further is nearer
        assert [hit.is_right for hit in query.hits[:2]] == ([True, False] if is_first else [False, True])
        assert query.outcome == f"its image comes {'1st' if is_first else '2nd'} of 12"
    for image_query in gallery.image_queries:
        assert [hit.is_right for hit in image_query.hits].count(True) == 2
        # the second caption of the image before lies at the very place
        assert [hit.is_right for hit in image_query.hits[:2]] == [False, True]
    with Image.open(io.BytesIO(gallery.image_queries[0].jpeg)) as image:
        assert image.size == (112, 112)


def test_features_are_found_however_the_path_of_the_set_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_retrieval_output(Path("pairs"), Path("out"))
    monkeypatch.chdir("/")
    assert pictures_of(tmp_path / "out").notes == ()


def test_one_gallery_of_each_set_of_the_newest_checkpoint(tmp_path: Path) -> None:
    for step in (10, 30, 20):
        write_retrieval_output(tmp_path / "pairs", tmp_path / "out", step)
    (gallery,) = pictures_of(tmp_path / "out").galleries
    assert "step 30" in gallery.subtitle


def test_pictures_are_bounded_and_what_is_gone_is_said(tmp_path: Path) -> None:
    for index in range(5):
        write_retrieval_output(tmp_path / f"pairs{index}", tmp_path / "out")
    (tmp_path / "pairs4" / "test" / "0.tar").unlink()
    pictures = pictures_of(tmp_path / "out")
    assert len(pictures.galleries) == 3
    assert len(pictures.notes) == 2
    assert any("0.tar" in note for note in pictures.notes)
    assert any("3 retrieval sets are shown" in note for note in pictures.notes)


def test_features_that_are_missing_leave_a_note(tmp_path: Path) -> None:
    write_retrieval_output(tmp_path / "pairs", tmp_path / "out")
    next((tmp_path / "out" / "features").glob("*/*.safetensors")).unlink()
    pictures = pictures_of(tmp_path / "out")
    assert not pictures.galleries
    assert "have no features yet" in pictures.notes[0]


@pytest.mark.parametrize(("count", "has_chart"), [(3, True), (51, False)])
def test_confusions(tmp_path: Path, count: int, has_chart: bool) -> None:
    names = [HOSTILE, "$x$", *(f"class {index}" for index in range(2, count))]
    write_classification_output(tmp_path / "classes", tmp_path / "out", names)
    (confusion,) = pictures_of(tmp_path / "out").confusions
    assert (confusion.chart is not None) == has_chart
    (row,) = confusion.pairs.rows
    assert row.label == f"$x$ → {HOSTILE}"
    assert [cell.text for cell in row.cells] == ["3", "75.0"]


def test_queries_are_spread_evenly() -> None:
    assert spread(range(10), 5) == [1, 3, 5, 7, 9]
    assert spread(range(3), 5) == [0, 1, 2]
    assert spread(range(1000), 2) == [250, 750]
