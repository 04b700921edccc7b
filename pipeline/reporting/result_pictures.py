"""The pictures of a report that need features and data sets: bounded in number, and left out, with a note, if gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.errors import UserError
from pipeline.evaluation.sets.layouts import ClassificationSet, RetrievalSet
from pipeline.evaluation.tasks import retrieval, zero_shot
from pipeline.reporting.confusion import MAX_CONFUSIONS, Confusion, draw_confusion
from pipeline.reporting.gallery import MAX_GALLERIES, Gallery, draw_gallery
from pipeline.reporting.stored_features import find_jobs, newest_of_each_set


@dataclass(frozen=True)
class ResultPictures:
    """Galleries and confusions of the newest checkpoint on each set; notes say what could not be shown."""

    galleries: tuple[Gallery, ...]
    confusions: tuple[Confusion, ...]
    notes: tuple[str, ...]


def draw_result_pictures(outputs: Sequence[Path]) -> ResultPictures:
    """Pictures of what lies in evaluation outputs."""
    jobs, notes = find_jobs(outputs)
    galleries: list[Gallery] = []
    confusions: list[Confusion] = []
    for stored in newest_of_each_set(jobs, RetrievalSet, retrieval.TASK):
        if len(galleries) == MAX_GALLERIES:
            notes.append(f"No pictures of {stored.job.dataset_name}: {MAX_GALLERIES} retrieval sets are shown.")
            continue
        try:
            galleries.append(draw_gallery(stored))
        except UserError as error:
            notes.append(f"No pictures of {stored.job.dataset_name}: {error}.")
    for stored in newest_of_each_set(jobs, ClassificationSet, zero_shot.TASK):
        if len(confusions) == MAX_CONFUSIONS:
            notes.append(f"No confusions of {stored.job.dataset_name}: {MAX_CONFUSIONS} sets are shown.")
            continue
        try:
            confusions.append(draw_confusion(stored, len(confusions)))
        except UserError as error:
            notes.append(f"No confusions of {stored.job.dataset_name}: {error}.")
    return ResultPictures(tuple(galleries), tuple(confusions), tuple(notes))
