"""Concepts taught in stages: the stage is a function of the samples that the run has seen, and of nothing else."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from formats.concepts import Concept, Concepts, read_concepts
from formats.errors import UserError
from pipeline.recipe import ConceptsSection


@dataclass(frozen=True)
class Curriculum:
    """Concepts, and after how many samples of the run stages 2, 3, … begin; without boundaries all are there."""

    concepts: Concepts
    boundaries: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """The last stage: of the concepts, or where there are none, of the boundaries."""
        return len(self.boundaries) + 1 if self.boundaries else self.concepts.num_stages

    def stage(self, samples_seen: int) -> int:
        """The stage, counted from 1, of the sample that comes after so many."""
        if not self.boundaries:
            return self.num_stages
        return 1 + bisect.bisect_right(self.boundaries, samples_seen)

    def num_taught(self, samples_seen: int) -> int:
        """How many concepts the stages until then have: the first so many of the file."""
        return self.concepts.up_to(self.stage(samples_seen))


# Of curricula that teach any words.
NO_CONCEPTS = Concepts((), captions=1, sha256="")


def read_curriculum(section: ConceptsSection) -> Curriculum | None:
    """What a recipe teaches, None where concepts have no use; UserError for a file or boundaries that do not fit."""
    if section.objective == "none":
        return None
    if not section.file and section.teaches_words:
        return Curriculum(NO_CONCEPTS, section.boundaries)
    if not section.file:
        raise UserError(f"concepts.objective {section.objective} needs concepts.file, made by `data-prep concepts`")
    concepts = read_concepts(section.file)
    if section.boundaries and len(section.boundaries) != concepts.num_stages - 1:
        raise UserError(
            f"concepts.boundaries has {len(section.boundaries)} numbers, and {section.file} has "
            f"{concepts.num_stages} stages: give {concepts.num_stages - 1}, the samples seen after which each next "
            "stage begins, or none"
        )
    return Curriculum(concepts, section.boundaries)


# Concepts of a recipe whose file is not made yet.
_PLANNED_CONCEPTS = 10_000


def planned_curriculum(section: ConceptsSection) -> Curriculum | None:
    """The same for a plan, which may be older than the file: then some number of concepts in one stage."""
    try:
        return read_curriculum(section)
    except UserError:
        nameless = [Concept(f"concept {number}", 1, 1, 1) for number in range(_PLANNED_CONCEPTS)]
        return Curriculum(Concepts(nameless, captions=_PLANNED_CONCEPTS, sha256=""), ())
