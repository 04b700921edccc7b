"""The order of samples over random worlds, against a slow implementation: lists that are written out in full."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_material import Place, Start, read_all, starts_of_a_run

from pipeline.data.coverage import cover
from pipeline.data.sample_order import BatchPlan, MixedOrder, Proportions, SampleOrder


@dataclass(frozen=True)
class World:
    """Sets of shards, their weights, and how they are read."""

    sets: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...]
    window_shards: int
    seed: int
    with_replacement: bool

    @property
    def num_samples(self) -> int:
        return sum(map(sum, self.sets))

    def order(self) -> MixedOrder:
        orders = [
            SampleOrder(sizes, self.window_shards, self.seed, number, self.with_replacement)
            for number, sizes in enumerate(self.sets)
        ]
        return MixedOrder(orders, self.weights)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sizes = st.lists(st.integers(1, 20), min_size=1, max_size=6).map(tuple)
    sets = draw(st.lists(sizes, min_size=1, max_size=4).map(tuple))
    weights = draw(st.tuples(*[st.integers(1, 12)] * len(sets)))
    is_union = draw(st.booleans())
    return World(
        sets,
        tuple(map(sum, sets)) if is_union else weights,
        draw(st.integers(1, 7)),
        draw(st.integers(0, 5)),
        draw(st.booleans()),
    )


def slow_set(world: World, number: int) -> Iterator[Place]:
    """One set's samples for ever, epoch by epoch."""
    sizes = world.sets[number]
    for epoch in itertools.count():
        shards = np.random.default_rng((world.seed, number, epoch, 0)).permutation(len(sizes))
        for window, first in enumerate(range(0, len(sizes), world.window_shards)):
            samples = [
                (int(shard), index)
                for shard in shards[first : first + world.window_shards]
                for index in range(sizes[shard])
            ]
            rng = np.random.default_rng((world.seed, number, epoch, 1, window))
            count = len(samples)
            drawn = rng.integers(count, size=count) if world.with_replacement else rng.permutation(count)
            yield from (samples[offset] for offset in drawn)


def slow_choice(weights: Sequence[int]) -> Iterator[int]:
    """The set at each position, by counting: a set takes its turn when it is due one of those that reach it."""
    reached, taken = [0] * len(weights), [0] * len(weights)
    while True:
        for number in range(len(weights)):
            reached[number] += 1
            due = reached[number] * Fraction(weights[number], sum(weights[number:]))
            if due >= taken[number] + 1:
                taken[number] += 1
                yield number
                break


def slow_order(world: World, count: int) -> list[Place]:
    """The first samples of the stream; shards are numbered through the sets."""
    streams = [slow_set(world, number) for number in range(len(world.sets))]
    first_shards = [sum(len(sizes) for sizes in world.sets[:number]) for number in range(len(world.sets))]
    places = []
    for number in itertools.islice(slow_choice(world.weights), count):
        shard, index = next(streams[number])
        places.append((first_shards[number] + shard, index))
    return places


@given(world=worlds(), starts=starts_of_a_run())
@settings(max_examples=150, deadline=None)
def test_any_ranks_workers_and_restarts_read_the_slow_order(world: World, starts: list[Start]) -> None:
    order = world.order()
    read = read_all(order, starts)
    assert read == slow_order(world, len(read))

    seen = Counter(read)
    covered = cover(order, [range(len(read))])
    assert sum(coverage.unique for coverage in covered) == len(seen)
    assert sum(coverage.seen for coverage in covered) == len(read)
    assert sum(coverage.repeated for coverage in covered) == sum(count - 1 for count in seen.values())


def test_of_billions_no_sample_is_looked_at_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = SampleOrder._draw_window

    def counted(self: SampleOrder, epoch: int, window: int) -> np.ndarray:
        drawn.append(window)
        return draw(self, epoch, window)

    monkeypatch.setattr(SampleOrder, "_draw_window", counted)
    order = MixedOrder([SampleOrder([10_000] * 200_000, window_shards=16, seed=3)], [1])
    (all_of_it,) = cover(order, [range(order.num_samples)])
    assert all_of_it.unique == order.num_samples == 2_000_000_000
    assert not drawn
    (part,) = cover(order, [range(5, 1_000_007)])
    assert (part.seen, part.unique) == (1_000_002, 1_000_002)
    assert len(drawn) == 2, "where the stretch begins and ends"


@given(world=worlds(), start=st.integers(0, 300), lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_coverage_counts_what_some_stretches_hold(world: World, start: int, lengths: list[int]) -> None:
    """As the stages of a run, which begin epochs of their own, leave positions out."""
    stretches = [range(start + 100 * number, start + 100 * number + length) for number, length in enumerate(lengths)]
    places = slow_order(world, stretches[-1].stop)
    shards = 0
    for coverage, sizes in zip(cover(world.order(), stretches), world.sets, strict=True):
        own = [places[p] for positions in stretches for p in positions if shards <= places[p][0] < shards + len(sizes)]
        assert (coverage.seen, coverage.unique, coverage.samples) == (len(own), len(set(own)), sum(sizes))
        shards += len(sizes)


@given(world=worlds(), epoch=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_an_epoch_has_every_sample_once(world: World, epoch: int) -> None:
    """Of one set, and of several whose weights are their sizes; with replacement, of each window only as many."""
    union = World(world.sets, tuple(map(sum, world.sets)), world.window_shards, world.seed, world.with_replacement)
    order, size = union.order(), union.num_samples
    places = [order.locate(epoch * size + position) for position in range(size)]
    all_places = [(shard, index) for shard, count in enumerate(itertools.chain(*union.sets)) for index in range(count)]
    if not world.with_replacement:
        assert sorted(places) == all_places
    assert set(places) <= set(all_places)


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=10), window=st.integers(1, 11), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_more_shards_than_a_window_are_open(sizes: list[int], window: int, seed: int) -> None:
    places = [SampleOrder(sizes, window, seed).locate(position) for position in range(sum(sizes))]
    for shard in range(len(sizes)):
        positions = [position for position, place in enumerate(places) if place[0] == shard]
        assert len({places[p][0] for p in range(positions[0], positions[-1] + 1)}) <= window


@given(world=worlds())
@settings(max_examples=60, deadline=None)
def test_what_is_read_next_was_announced(world: World) -> None:
    """A shard is open when a sample of it comes, and is fetched at the latest one window of its set before."""
    order = world.order()
    announced: list[int] = []
    for position in range(2 * world.num_samples):
        shard, _ = order.locate(position)
        now, following = order.windows_at(position)
        assert shard in now
        assert len(now) <= world.window_shards * len(world.sets)
        assert set(now) <= set(announced) or not announced
        announced = [*now, *following]


@given(weights=st.lists(st.integers(1, 10**7), min_size=1, max_size=8), position=st.integers(0, 10**10))
@settings(max_examples=200, deadline=None)
def test_every_prefix_of_a_mixture_is_near_its_weights(weights: list[int], position: int) -> None:
    proportions, total = Proportions(weights), sum(weights)
    counts = proportions.counts(position)
    assert sum(counts) == position
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(position * weight, total)) < len(weights)
    number, own = proportions.locate(position)
    assert own == counts[number]
    after = proportions.counts(position + 1)
    assert [b - a for a, b in zip(counts, after, strict=True)] == [int(n == number) for n in range(len(weights))]
    assert proportions.counts(total * 3) == [3 * weight for weight in weights]


def test_epochs_seeds_and_sets_differ_and_shuffling_is_real() -> None:
    def sequence(seed: int, epoch: int, number: int = 0) -> list[Place]:
        return [SampleOrder((50, 50, 50), 3, seed, number).locate(150 * epoch + p) for p in range(150)]

    sequences = [sequence(0, 0), sequence(0, 1), sequence(1, 0), sequence(0, 0, 1), sequence(1, 0, 1)]
    assert sequences[0] == sequence(0, 0)
    assert all(a != b for a, b in itertools.combinations(sequences, 2))
    # the shards' own order changes too, with windows of one shard
    by_shard = SampleOrder((9,) * 12, 1, 0)
    assert len({tuple(by_shard.locate(108 * epoch + p)[0] for p in range(108)) for epoch in range(3)}) == 3
    neighbours = sum(abs(a[1] - b[1]) <= 1 for a, b in itertools.pairwise(sequences[0]))
    assert neighbours < 20


def test_with_replacement_about_a_third_is_not_seen_in_an_epoch() -> None:
    order = World(((1000,) * 20,), (1,), 4, 0, with_replacement=True).order()
    (once,), (twice,) = cover(order, [range(20_000)]), cover(order, [range(40_000)])
    assert once.unique / once.samples == pytest.approx(1 - np.exp(-1), abs=0.01)
    assert twice.unique / twice.samples == pytest.approx(1 - np.exp(-2), abs=0.01)


def test_a_step_reads_the_same_samples_at_any_world_size() -> None:
    for step in range(10):
        seen = set()
        for ranks, micro, accumulation in [(1, 24, 1), (2, 12, 1), (3, 4, 2), (4, 6, 1), (1, 3, 8)]:
            plan = BatchPlan(100, 24, micro, ranks)
            of_ranks = (plan.micro_batch(step, a, rank) for a in range(accumulation) for rank in range(ranks))
            seen.add(tuple(position for positions in of_ranks for position in positions))
        assert len(seen) == 1


def test_a_seek_is_no_walk() -> None:
    """Far into 400 million samples: only the windows around a position are ever drawn."""
    order = MixedOrder([SampleOrder((10_000,) * 40_000, 8, 0), SampleOrder((500,) * 3, 8, 0, 1)], (9, 1))
    first = 12 * order.num_samples + 123_456_789
    places = [order.locate(first + number) for number in range(30)]
    assert places == [order.locate(first + number) for number in range(30)]
    for own in order.orders:
        assert own._lap.cache_info().misses == 1
        assert own._window.cache_info().misses <= 2
