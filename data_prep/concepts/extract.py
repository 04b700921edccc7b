"""`data-prep concepts`: captions of shards -> n-grams -> concepts -> their graph -> stages, with a page to look at."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.concepts.concepts_page import write_page
from data_prep.concepts.counting import add_ngrams, count_ngrams, count_pairs
from data_prep.concepts.graphs import Edges, edges_of_captions, edges_of_conceptnet, edges_of_wordnet
from data_prep.concepts.staging import assign_stages, choose_concepts
from data_prep.console import print_table, progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import reading
from formats.concepts import Concept, Concepts, read_concepts, write_concepts
from formats.errors import UserError
from formats.files import make_folder, sha256_of
from formats.manifest import Manifest, Shard, read_manifest

COOCCURRENCE, WORDNET, CONCEPTNET = "cooccurrence", "wordnet", "conceptnet"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How concepts are chosen, connected and staged; docs/concepts.md says what each is for.

    source: folder of WordNet, or file of ConceptNet
    """

    stages: int
    graph: str
    source: Path | None
    min_count: int
    most: int
    min_npmi_of_words: float
    min_npmi: float
    min_together: int
    first_share: float
    language: str

    def parameters(self) -> dict[str, Any]:
        """For the header of the file."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "source"}


def extract_concepts(
    directory: Path, output: Path, choice: Choice, *, processes: int, part: tuple[int, int] | None = None
) -> None:
    """Make the file of concepts (formats.concepts) of a verified shard directory, and its page.

    part: (i, n): count for share i of n of the shards what can be counted now, and no more
    Counts of shards are kept beside the output until it is made: a run that was killed goes on, and slices share them.
    Raises UserError for captions without enough concepts, and a graph that cannot be read.
    """
    with reading(directory):
        manifest = read_manifest(directory)
        work = _Work(directory, manifest, output.with_name(f".{output.name}.counts"), processes)
        ngrams = work.files(f"ngrams-{manifest.sha256[:16]}", ".txt")
        if part is not None and work.count(ngrams, count_ngrams, "n-grams", part):
            print(f"slice {part[0]}/{part[1]}: n-grams are counted; when all slices are, run them once more")
            return
        if part is None:
            work.count(ngrams, count_ngrams, "n-grams")
        concepts = _choose(directory, ngrams, make_folder(work.folder), choice)
        pairs: list[Path] = []
        if choice.graph == COOCCURRENCE:
            pairs = work.files(f"pairs-{concepts.sha256[:16]}", ".npy")
            work.count(pairs, functools.partial(_count_pairs, concepts), "pairs", part)
        if part is not None:
            print(f"slice {part[0]}/{part[1]}: all is counted; when all slices have, run the same without --slice")
            return
        edges = _edges(concepts, pairs, choice)
        counts = {concept.concept: concept.count for concept in concepts.concepts}
        staged = assign_stages([*counts], counts, edges, choice.stages, choice.first_share)
        hashes = {"manifest_sha256": manifest.sha256} | _hash_of(choice)
        made_by = {"source": directory.resolve().name, "parameters": choice.parameters(), "hashes": hashes}
        write_concepts(output, staged, concepts.captions, made_by)
        page = output.with_suffix(".html")
        coverage = write_page(page, directory, read_concepts(str(output)), manifest, processes)
    shutil.rmtree(work.folder)
    _print(output, page, staged, coverage, choice)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Files of counts, one for each shard, in a folder that is named after what they depend on."""

    directory: Path
    manifest: Manifest
    folder: Path
    processes: int

    def files(self, name: str, ending: str) -> list[Path]:
        """Where the counts of each shard are, or will be."""
        return [self.folder / name / f"{shard.name.removesuffix('.tar')}{ending}" for shard in self.manifest.shards]

    def count(
        self,
        files: Sequence[Path],
        count_shard: Callable[[Path, Path, Shard], None],
        what: str,
        part: tuple[int, int] | None = None,
    ) -> bool:
        """Make those of a share of the files that are not there yet; whether any of all is still missing."""
        index, number = part or (0, 1)
        make_folder(files[0].parent)
        mine = [*zip(files, self.manifest.shards, strict=True)][index::number]
        left = [(file, shard) for file, shard in mine if not file.exists()]
        with progress_bar(f"count {what}", len(left), "shard") as progress:
            work = functools.partial(_count_one, count_shard, self.directory)
            for _ in map_in_processes(work, left, self.processes, limit=len(left)):
                progress.update()
        return not all(file.exists() for file in files)


def _count_one(count_shard: Callable[[Path, Path, Shard], None], directory: Path, item: tuple[Path, Shard]) -> None:
    count_shard(directory, *item)


def _count_pairs(concepts: Concepts, directory: Path, file: Path, shard: Shard) -> None:
    count_pairs(directory, concepts, file, shard)


def _choose(directory: Path, files: Sequence[Path], folder: Path, choice: Choice) -> Concepts:
    """The concepts in the order of their counts, all in one stage yet; their hash is that of what they are."""
    with tempfile.TemporaryDirectory(prefix="ngrams.", dir=folder) as scratch:
        captions, counts = add_ngrams(files, choice.min_count, Path(scratch))
        names = choose_concepts(counts, captions, choice.min_npmi_of_words, choice.most)
        if len(names) < choice.stages:
            raise UserError(
                f"{directory} has {len(names)} concepts in at least {choice.min_count} of its {captions:,} captions, "
                f"too few for {choice.stages} stages: lower --min-count, or take more shards"
            )
        unstaged = Path(scratch) / "concepts.jsonl"
        write_concepts(unstaged, [Concept(name, 1, counts[name], 0) for name in names], captions, {})
        return read_concepts(str(unstaged))


def _edges(concepts: Concepts, pairs: Sequence[Path], choice: Choice) -> Edges:
    names = [concept.concept for concept in concepts.concepts]
    if choice.graph == COOCCURRENCE:
        counts_C = np.array([concept.count for concept in concepts.concepts])
        edges = edges_of_captions(pairs, counts_C, concepts.captions, choice.min_npmi, choice.min_together)
    elif choice.graph == WORDNET:
        edges = edges_of_wordnet(_source(choice), names)
    else:
        edges, malformed = edges_of_conceptnet(_source(choice), names, choice.language)
        if malformed:
            print(f"{choice.source}: {malformed:,} lines are no assertions and were passed over")
    if not len(edges):
        raise UserError(f"no two of the {len(names):,} concepts are connected in --graph {choice.graph}: take another")
    return edges


def _source(choice: Choice) -> Path:
    if choice.source is None:
        raise UserError(f"--graph {choice.graph} needs its files: --graph {choice.graph}:PATH")
    return choice.source


def _hash_of(choice: Choice) -> dict[str, str]:
    if choice.source is None:
        return {}
    if choice.source.is_file():
        return {"graph_sha256": sha256_of(choice.source)}
    return {f"{path.name}_sha256": sha256_of(path) for path in sorted(choice.source.glob("data.*"))}


def _print(output: Path, page: Path, concepts: Sequence[Concept], coverage: Sequence[float], choice: Choice) -> None:
    made = concepts[-1].stage
    rows = []
    for stage in range(1, made + 1):
        own = [concept for concept in concepts if concept.stage == stage]
        examples = ", ".join(concept.concept for concept in own[:6])
        rows.append((str(stage), f"{len(own):,}", f"{coverage[stage - 1]:.1%}", examples))
    print(f"{output}: {len(concepts):,} concepts")
    print_table(("stage", "concepts", "captions so far", "the best connected"), rows)
    if made < choice.stages:
        print(f"{made} stages and not {choice.stages}: no concept was left for the others")
    print(page)
