"""Concepts of captions against slow, obvious ways: what is counted, what is connected, in which stage it is taught."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.__main__ import main
from data_prep.concepts.counting import WORDS_BETWEEN, add_ngrams, add_pairs, count_ngrams, count_pairs
from data_prep.concepts.graphs import edges_of_captions, edges_of_conceptnet, edges_of_wordnet
from data_prep.concepts.staging import assign_stages, choose_concepts
from data_prep.shards.verify import verify
from data_prep.shards.writer import ShardWriter
from formats.concepts import Concept, Concepts, read_concepts
from formats.errors import UserError
from formats.manifest import read_manifest

CAPTIONS = [
    "a brown dog runs over the wet grass",
    "the hot dog lies on a plate",
    "A hot dog, with mustard, near a brown dog!",
    "two men eat a hot dog in the rain",
    "the brown dog and the cat sleep on the bed",
    "a cat sleeps near the brown bed of a dog",
    "a plate of grass",
    "two cats on the wet grass near two men",
    "<b>ein Hund</b> läuft über die Wiese",
] * 3


def make_shards(folder: Path, captions: Sequence[str], per_shard: int = 8) -> Path:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(stream, "JPEG")
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for number, caption in enumerate(captions):
            writer.write(f"{number:05d}", {"jpg": stream.getvalue(), "txt": caption.encode()})
    verify(folder, processes=1, max_bad_ratio=0.0)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("concepts") / "shards", CAPTIONS)


def words_of(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def slow_counts(captions: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for caption in captions:
        text, words = f" {' '.join(words_of(caption))} ", words_of(caption)
        for size in range(1, 5):
            for first in range(len(words) - size + 1):
                ngram = " ".join(words[first : first + size])
                assert f" {ngram} " in text
                counts.setdefault(ngram, sum(f" {ngram} " in f" {' '.join(words_of(c))} " for c in captions))
    return counts


def slow_npmi(both: int, one: int, other: int, captions: int) -> float:
    if both == captions:
        return 1.0
    return math.log((both / captions) / ((one / captions) * (other / captions))) / -math.log(both / captions)


def slow_concepts(counts: dict[str, int], captions: int, min_count: int, threshold: float) -> list[str]:
    def whole(ngram: str) -> bool:
        words = ngram.split()
        return all(
            slow_npmi(counts[ngram], counts[" ".join(words[:i])], counts[" ".join(words[i:])], captions) >= threshold
            for i in range(1, len(words))
        )

    kept = [n for n in counts if counts[n] >= min_count and whole(n)]
    longer = [n for n in kept if " " in n]

    def is_part(ngram: str) -> bool:
        return " " in ngram and any(
            (big.startswith(f"{ngram} ") or big.endswith(f" {ngram}"))
            and len(big.split()) == len(ngram.split()) + 1
            and counts[big] == counts[ngram]
            for big in longer
        )

    return sorted((n for n in kept if not is_part(n)), key=lambda n: (-counts[n], n))


def places(concept: str, words: Sequence[str]) -> list[tuple[int, int]]:
    parts = concept.split()
    return [(i, i + len(parts)) for i in range(len(words)) if list(words[i : i + len(parts)]) == parts]


def slow_edges(
    names: Sequence[str], captions: Sequence[str], min_npmi: float, min_together: int
) -> set[tuple[str, str]]:
    counts = {name: sum(bool(places(name, words_of(caption))) for caption in captions) for name in names}
    edges = set()
    for one, other in combinations(names, 2):
        both = 0
        for caption in captions:
            words = words_of(caption)
            gaps = [
                max(b0 - a1, a0 - b1)
                for a0, a1 in places(one, words)
                for b0, b1 in places(other, words)
            ]  # fmt: skip
            both += max(gaps, default=-1) >= WORDS_BETWEEN
        if both >= min_together and slow_npmi(both, counts[one], counts[other], len(captions)) >= min_npmi - 1e-12:
            edges.add((one, other))
    return edges


def test_ngrams_and_pairs_are_those_of_a_search_in_every_caption(shards: Path, tmp_path: Path) -> None:
    manifest = read_manifest(shards)
    ngrams = [tmp_path / f"{shard.name}.txt" for shard in manifest.shards]
    pairs = [tmp_path / f"{shard.name}.npy" for shard in manifest.shards]
    assert len(ngrams) == 4
    for file, shard in zip(ngrams, manifest.shards, strict=True):
        count_ngrams(shards, file, shard)
    expected = {ngram: count for ngram, count in slow_counts(CAPTIONS).items() if count >= 3}
    for most_in_memory in (1, 10**6):  # through files, and without
        assert add_ngrams(ngrams, 3, tmp_path, most_in_memory) == (len(CAPTIONS), expected)

    names = choose_concepts(expected, len(CAPTIONS), 0.35, 100)
    assert names == slow_concepts(expected, len(CAPTIONS), 3, 0.35)
    assert {"hot dog", "wet grass", "läuft"} <= {*names}
    assert "brown dog" not in names
    concepts = Concepts([Concept(name, 1, expected[name], 0) for name in names], len(CAPTIONS), "")
    for file, shard in zip(pairs, manifest.shards, strict=True):
        count_pairs(shards, concepts, file, shard)
    together = {
        (first + row, column): count
        for first, block in add_pairs(pairs, len(names))
        for row, line in enumerate(block.tolist())
        for column, count in enumerate(line)
        if count
    }
    assert all(i < j for i, j in together)
    counts_C = np.array([expected[name] for name in names])
    for min_npmi, min_together in ((0.0, 1), (0.1, 3), (0.5, 6)):
        edges = edges_of_captions(pairs, counts_C, len(CAPTIONS), min_npmi, min_together)
        found = {(names[i], names[j]) for i, j in edges.tolist()}
        assert found == slow_edges(names, CAPTIONS, min_npmi, min_together)


_WORDS = st.sampled_from(["red", "dog", "cat", "runs", "on"])


@given(st.lists(st.lists(_WORDS, min_size=1, max_size=6), min_size=2, max_size=12), st.floats(-0.5, 0.9))
def test_a_run_of_words_is_a_concept_if_no_cut_parts_it(captions: list[list[str]], threshold: float) -> None:
    lines = [" ".join(words) for words in captions]
    counts = slow_counts(lines)
    found = choose_concepts(counts, len(lines), threshold, 10_000)
    assert found == slow_concepts(counts, len(lines), 1, threshold)
    assert choose_concepts(counts, len(lines), threshold, 3) == found[:3]


def slow_stages(counts: Sequence[int], edges: set[tuple[int, int]], num_stages: int, first: int) -> list[set[int]]:
    size = len(counts)
    links = {i: {j for pair in edges if i in pair for j in pair if j != i} for i in range(size)}
    frequent = sorted(range(size), key=lambda i: (-counts[i], i))[: 2 * first]
    stages = [set(sorted(frequent, key=lambda i: (-len(links[i]), -counts[i], i))[:first])]
    for stage in range(2, num_stages):
        before = set.union(*stages)
        wanted = round(first * (size / first) ** ((stage - 1) / (num_stages - 1))) - len(before)
        near = [i for i in range(size) if i not in before and links[i] & before]
        stages.append(set(sorted(near, key=lambda i: (-len(links[i] & before), -counts[i], i))[: max(0, wanted)]))
    stages.append({*range(size)} - set.union(*stages))
    return [stage for stage in stages if stage]


@given(st.data())
def test_stages_are_the_best_connected_then_their_neighbours_then_the_rest(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 25))
    counts = data.draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))
    number = st.integers(0, size - 1)
    drawn = data.draw(st.sets(st.tuples(number, number), max_size=60))
    edges = {(min(pair), max(pair)) for pair in drawn if pair[0] != pair[1]}
    num_stages, share = data.draw(st.integers(2, 5)), data.draw(st.sampled_from([0.1, 0.3, 1.0]))
    names = [f"w{i:02d}" for i in range(size)]
    array = np.array(sorted(edges), np.int64).reshape(-1, 2)
    made = assign_stages(names, dict(zip(names, counts, strict=True)), array, num_stages, share)
    assert sorted(concept.concept for concept in made) == names  # each once
    expected = slow_stages(counts, edges, num_stages, max(1, math.ceil(share * size)))
    found = [{int(c.concept[1:]) for c in made if c.stage == stage} for stage in range(1, made[-1].stage + 1)]
    assert found == expected
    for concept in made:
        i = int(concept.concept[1:])
        assert (concept.count, concept.degree) == (counts[i], sum(i in pair for pair in edges))


ARGUMENTS = ["--min-count", "3", "--min-together", "3", "--stages", "3", "--processes", "1"]


def run(*arguments: object) -> int:
    return main(["concepts", *map(str, arguments)])


def test_slices_processes_and_a_second_start_make_the_same_file(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(shards, "--output", tmp_path / "whole.jsonl", *ARGUMENTS) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    page = (tmp_path / "whole.html").read_text()
    assert "<b>" not in page
    assert "läuft" in page
    assert "captions so far" in capsys.readouterr().out
    made = read_concepts(str(tmp_path / "whole.jsonl"))
    assert made.captions == len(CAPTIONS)
    assert made.num_stages == 3
    header = json.loads(whole.splitlines()[0])
    assert header["hashes"] == {"manifest_sha256": read_manifest(shards).sha256}
    assert header["parameters"]["min_count"] == 3
    assert header["source"] == "shards"

    sliced = tmp_path / "sliced.jsonl"
    for turn in range(2):  # n-grams, then pairs
        for index in range(2):
            assert run(shards, "--output", sliced, *ARGUMENTS, "--slice", f"{index}/2") == 0
            assert not sliced.exists()
        assert len([*tmp_path.glob(f".sliced.jsonl.counts/*/*.{('txt', 'npy')[turn]}")]) == 4
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".sliced.jsonl.counts/*/*")}
    assert run(shards, "--output", sliced, *ARGUMENTS) == 0
    assert sliced.read_bytes() == whole
    assert len(kept) == 8
    assert not [*tmp_path.glob(".*")]

    again = tmp_path / "again.jsonl"
    assert run(shards, "--output", again, *ARGUMENTS, "--slice", "1/2") == 0  # as if it had been killed there
    assert run(shards, "--output", again, *ARGUMENTS[:-1], 2) == 0
    assert again.read_bytes() == whole


def synset(offset: int, words: Sequence[str], pointers: Sequence[int]) -> str:
    listed = " ".join(f"{word} 0" for word in words)
    return f"{offset:08d} 05 n {len(words):02x} {listed} {len(pointers):03d} " + "".join(
        f"@ {there:08d} n 0000 " for there in pointers
    ) + "| made up  \n"  # fmt: skip


def test_wordnet_connects_the_commonest_senses_of_nouns(tmp_path: Path) -> None:
    licence = "  1 a licence, behind spaces\n"
    (tmp_path / "data.noun").write_text(
        licence
        + synset(10, ["animal"], [])
        + synset(20, ["dog", "domestic_dog"], [10])
        + synset(30, ["hot_dog", "frankfurter"], [40])
        + synset(40, ["food"], [])
        + synset(50, ["mouse"], [10])
        + synset(60, ["mouse"], [40])  # a rarer sense, that counts for nothing
    )
    senses = {"animal": [10], "dog": [20], "domestic_dog": [20], "hot_dog": [30, 20], "food": [40], "mouse": [50, 60]}
    lines = (
        f"{lemma} n {len(offsets)} 2 @ ~ {len(offsets)} 1 {' '.join(f'{offset:08d}' for offset in offsets)}  \n"
        for lemma, offsets in senses.items()
    )
    (tmp_path / "index.noun").write_text(licence + "".join(lines))
    (tmp_path / "noun.exc").write_text("mice mouse\n")
    names = ["animals", "dogs", "domestic dog", "hot dog", "food", "mice", "running", "frankfurter"]
    found = {(names[i], names[j]) for i, j in edges_of_wordnet(tmp_path, names).tolist()}
    assert found == {
        ("animals", "dogs"), ("animals", "domestic dog"), ("animals", "mice"),
        ("dogs", "domestic dog"), ("hot dog", "food"),
    }  # fmt: skip
    (tmp_path / "index.noun").unlink()
    with pytest.raises(UserError, match=r"has no index\.noun: .*wordnet-base"):
        edges_of_wordnet(tmp_path, names)


def test_conceptnet_connects_the_ends_of_assertions_in_one_language(tmp_path: Path) -> None:
    lines = [
        "/a/1\t/r/IsA\t/c/en/dog/n\t/c/en/animal\t{}",
        "/a/2\t/r/IsA\t/c/en/hot_dog/n/wn/food\t/c/en/food/n\t{}",
        "/a/3\t/r/Synonym\t/c/en/dog\t/c/de/hund\t{}",
        "/a/4\t/r/IsA\t/c/de/food\t/c/de/animal\t{}",  # German words that look English
        "/a/5\t/r/ExternalURL\t/c/en/dog\thttp://example.org/en/animal\t{}",
        "/a/6\t/r/RelatedTo\t/c/en/dog\t/c/en/dog/v\t{}",  # itself
        "no assertion",
    ]
    names = ["animal", "dog", "food", "hot dog", "n", "en"]
    plain, packed = tmp_path / "assertions.csv", tmp_path / "assertions.csv.gz"
    plain.write_text("\n".join(lines))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for file in (plain, packed):
        edges, malformed = edges_of_conceptnet(file, names, "en")
        assert ({(names[i], names[j]) for i, j in edges.tolist()}, malformed) == (
            {("animal", "dog"), ("food", "hot dog")},
            2,
        )
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        edges_of_conceptnet(packed, names, "en")
    plain.write_text("a,b\n")
    with pytest.raises(UserError, match="holds no assertion"):
        edges_of_conceptnet(plain, names, "en")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-count", "25"], "has 0 concepts in at least 25 of its 27 captions, too few for 4 stages"),
        (["--min-count", "3", "--min-together", "27"], "no two of the .* concepts are connected"),
        (["--min-count", "3", "--graph", "wordnet:/nowhere"], "/nowhere has no index.noun"),
        (["--min-count", "3", "--graph", "conceptnet:/nowhere"], "/nowhere cannot be read"),
        (["--graph", "wordnet"], "must be cooccurrence, wordnet:DIR or conceptnet:FILE"),
        (["--stages", "1"], "at least 2"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code: object = run(shards, "--output", tmp_path / "concepts.jsonl", "--processes", 1, *arguments)
    except SystemExit as stop:
        code = stop.code
    errors = capsys.readouterr().err
    assert code, errors
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "concepts.jsonl").exists()
