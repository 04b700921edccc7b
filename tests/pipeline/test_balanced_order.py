"""Balanced orders over random worlds, against a slow implementation: every sample, lap after lap, in fractions."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from order_material import Place, Start, read_all, starts_of_a_run

from formats.balance import read_balance, write_balance
from formats.errors import UserError
from formats.manifest import Manifest, Shard
from pipeline.data.balanced_order import BalancedOrder, keep_apart
from pipeline.data.coverage import cover
from pipeline.data.draws import Draws
from pipeline.data.sample_order import MixedOrder
from pipeline.recipe import DrawKind

_64_BITS = (1 << 64) - 1


def draws_of(rates: Sequence[Sequence[float]], kind: DrawKind = "rotation", seed: int = 0) -> Draws:
    """Of a set with so many shards, by way of its files, which need not stay."""
    shards = tuple(Shard(f"{n:05d}.tar", len(of_shard), 0, "") for n, of_shard in enumerate(rates))
    manifest = Manifest("shards", shards, "ab" * 32)
    with tempfile.TemporaryDirectory() as folder:
        write_balance(Path(folder) / "b", manifest, (np.array(r, np.float64) for r in rates), {})
        balance = read_balance(Path(folder) / "b", manifest)
        kept = [np.array(balance.rates(number)) for number in range(len(shards))]
    object.__setattr__(balance, "rates", kept.__getitem__)
    return Draws(balance, kind, seed)


@dataclass(frozen=True)
class World:
    """A set with rates, and how it is read."""

    rates: tuple[tuple[float, ...], ...]
    kind: DrawKind
    window_shards: int
    seed: int

    def order(self) -> BalancedOrder:
        return BalancedOrder(draws_of(self.rates, self.kind, self.seed), self.window_shards, self.seed)

    @functools.cached_property
    def exact_rates(self) -> dict[Place, Fraction]:
        """Of each sample, as 16 bits have it."""
        return {
            (shard, index): Fraction(float(np.float16(rate)))
            for shard, of_shard in enumerate(self.rates)
            for index, rate in enumerate(of_shard)
        }

    @property
    def laps_per_epoch(self) -> int:
        return max(math.ceil(rate) for rate in self.exact_rates.values())


@st.composite
def worlds(draw: st.DrawFn) -> World:
    some_rates = st.sampled_from([0.0, 0.05, 0.3, 0.5, 1.0, 1.0, 1.7, 3.0]) | st.floats(0.01, 4)
    palette = draw(st.lists(some_rates, min_size=1, max_size=3).filter(any))
    if draw(st.booleans()):
        palette = [min(1.0, rate) for rate in palette]
    shard = st.lists(st.sampled_from(palette), min_size=1, max_size=20).map(tuple)
    rates = draw(st.lists(shard, min_size=1, max_size=10).map(tuple).filter(lambda rates: sum(map(sum, rates)) > 8))
    return World(
        rates, draw(st.sampled_from(["rotation", "bernoulli"])), draw(st.integers(1, 4)), draw(st.integers(0, 5))
    )


def slow_hash(world: World, row: int, *stream: int) -> Fraction:
    """SplitMix64 of a sample's number in the set, in [0, 1)."""
    key = int(np.random.SeedSequence((world.seed, 0, *stream)).generate_state(1, np.uint64)[0])
    mixed = (row * 0x9E3779B97F4A7C15 + key) & _64_BITS
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _64_BITS
    return Fraction((mixed ^ (mixed >> 31)) >> 32, 2**32)


@functools.cache
def slow_copies(world: World, epoch: int) -> dict[Place, int]:
    """How often each sample comes in an epoch."""
    copies = {}
    for row, (place, rate) in enumerate(world.exact_rates.items()):
        if world.kind == "rotation":
            h = slow_hash(world, row, 2)
            copies[place] = math.floor(h + (epoch + 1) * rate) - math.floor(h + epoch * rate)
        else:
            whole = math.floor(rate)
            copies[place] = whole + (slow_hash(world, row, 3, epoch) < rate - whole)
    return copies


@functools.cache
def slow_lap(world: World, lap: int) -> list[Place]:
    """The samples that come in a lap."""
    laps = world.laps_per_epoch
    epoch, own_lap = divmod(lap, laps)
    found = []
    for row, (place, copies) in enumerate(slow_copies(world, epoch).items()):
        h = slow_hash(world, row, 2)
        if world.kind == "rotation":
            per_lap, number = world.exact_rates[place] / laps, lap
        else:
            per_lap, number = Fraction(copies, laps), own_lap
        if math.floor(h + (number + 1) * per_lap) > math.floor(h + number * per_lap):
            found.append(place)
    return found


def slow_apart(before: list[int] | list[Place], now: list[int] | list[Place]) -> list[int] | list[Place]:
    """A third of `now` that did not come late in `before` goes first; else nothing moves."""
    third = min(len(before), len(now)) // 3
    late = before[len(before) - third :]
    first = [item for item in now[: 2 * third] if item not in late][:third]
    return [*first, *(item for item in now if item not in first)]  # type: ignore[return-value]


def slow_windows(shards: list[int], window_shards: int) -> list[list[int]]:
    """Each third in windows of its own: as few as can be, as equal as can be, the larger ones first."""
    third, windows = len(shards) // 3, []
    for part in (shards[:third], shards[third : len(shards) - third], shards[len(shards) - third :]):
        number = -(-len(part) // window_shards)
        sizes = [len(part) // number + (window < len(part) % number) for window in range(number)]
        windows += [part[sum(sizes[:window]) : sum(sizes[: window + 1])] for window in range(number)]
    return windows


def slow_order(world: World, laps: int) -> list[list[Place]]:
    """The samples of each lap, in order."""
    drawn = [slow_lap(world, lap) for lap in range(laps)]

    def shuffled_window(lap: int, shards: Sequence[int], window: int) -> list[Place]:
        samples = [place for shard in shards for place in drawn[lap] if place[0] == shard]
        rng = np.random.default_rng((world.seed, 0, lap, 1, window))
        return [samples[number] for number in rng.permutation(len(samples))]

    def shuffled_shards(lap: int) -> list[int]:
        shards = np.random.default_rng((world.seed, 0, lap, 0)).permutation(len(world.rates)).tolist()
        return [shard for shard in shards if any(place[0] == shard for place in drawn[lap])]

    in_order: list[list[Place]] = []
    for lap in range(laps):
        if len(world.rates) <= 2 * world.window_shards:
            units = [
                shuffled_window(number, range(len(world.rates)), 0) if number >= 0 else [] for number in (lap - 1, lap)
            ]
            in_order.append(slow_apart(*units))  # type: ignore[arg-type]
            continue
        shards = slow_apart(shuffled_shards(lap - 1) if lap else [], shuffled_shards(lap))
        of_lap: list[Place] = []
        for window, of_window in enumerate(slow_windows(shards, world.window_shards)):  # type: ignore[arg-type]
            of_lap += shuffled_window(lap, of_window, window)
        in_order.append(of_lap)
    return in_order


@given(world=worlds(), starts=starts_of_a_run())
@example(World(((1.0,) * 5,), "rotation", 1, 0), [(2, 3, 1, 2, 3), (1, 4, 1, 0, 2)])
@settings(max_examples=60, deadline=None)
def test_any_ranks_workers_and_restarts_read_the_slow_order(world: World, starts: list[Start]) -> None:
    order = world.order()
    read = read_all(MixedOrder([order], [1]), starts)
    laps = slow_order(world, (order.draws.lap_at(len(read)) + 1) if read else 1)
    assert read == [place for lap in laps for place in lap][: len(read)]
    (coverage,) = cover(MixedOrder([order], [1]), [range(len(read))])
    assert (coverage.seen, coverage.unique) == (len(read), len(set(read)))


@given(world=worlds(), epochs=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_epochs_are_exact_and_samples_near_each_other_differ(world: World, epochs: int) -> None:
    order = world.order()
    starts = [order.draws.start(epoch) for epoch in range(epochs + 1)]
    read = [order.locate(position) for position in range(starts[-1])]
    for epoch in range(epochs):
        expected = Counter({place: copies for place, copies in slow_copies(world, epoch).items() if copies})
        assert Counter(read[starts[epoch] : starts[epoch + 1]]) == expected
    seen = Counter(read)
    for place, rate in world.exact_rates.items():
        if world.kind == "rotation":
            assert abs(seen[place] - epochs * rate) < 1
        assert rate or not seen[place]
    if read:
        batch = order.largest_batch(range(len(read)))
        for first in range(len(read)):
            assert len(set(read[first : first + batch])) == len(read[first : first + batch])


@given(
    before=st.permutations(range(12)),
    now=st.permutations(range(3, 14)),
    lengths=st.tuples(st.integers(0, 12), st.integers(0, 11)),
)
@settings(max_examples=100, deadline=None)
def test_what_was_late_is_not_early(before: list[int], now: list[int], lengths: tuple[int, int]) -> None:
    before, now = before[: lengths[0]], now[: lengths[1]]
    third = min(lengths) // 3
    apart = keep_apart(np.array(before, int), np.array(now, int)).tolist()
    assert sorted(apart) == sorted(now)
    assert apart[len(apart) - third :] == now[len(now) - third :], "its own end is left for the lap after"
    assert not set(apart[:third]) & set(before[len(before) - third :])


@pytest.mark.parametrize(
    ("shards", "window"), [(1, 3), (6, 3), (7, 3), (8, 3), (9, 3), (15, 3), (60, 4), *((n, 8) for n in range(17, 27))]
)
def test_a_batch_of_a_third_is_possible(shards: int, window: int) -> None:
    """Of the samples of a set that is one window, else of its shards."""
    order = World(((0.5,) * 300,) * shards, "bernoulli", window, 1).order()
    share = 1 / 3 if shards <= 2 * window else shards // 3 / shards
    assert order.largest_batch(range(8 * order.draws.num_samples)) > 0.9 * share * order.draws.num_samples


def test_rates_are_kept_and_draws_do_not_depend_on_neighbours() -> None:
    rates = [0.05, 0.3, 1.0, 2.4]
    draws = draws_of([rates * 2000], "bernoulli")
    copies = np.zeros((3, 8000), int)
    for lap in range(3 * draws.laps_per_epoch):
        copies[lap // draws.laps_per_epoch, draws.drawn(lap, 0)] += 1
    for number, rate in enumerate(rates):
        of_rate = copies[:, number::4]
        assert of_rate.mean() == pytest.approx(rate, abs=0.02)
        assert set(np.unique(of_rate)) <= {math.floor(rate), math.ceil(rate)}
        if rate % 1:
            for one, other in ((of_rate[0], of_rate[1]), (of_rate[0, 1:], of_rate[0, :-1])):
                assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_an_undrawn_shard_is_neither_read_nor_announced() -> None:
    for window in (1, 4):
        order = World(
            ((0.0,) * 9, (0.7,) * 30, (0.0,) * 9, (1.0,) * 30, *((0.4,) * 30,) * 3), "rotation", window, 2
        ).order()
        for position in range(4 * order.draws.num_samples):
            now, following = order.windows_at(position)
            assert not {0, 2} & {*now, *following}
            assert order.locate(position)[0] in now


def test_a_seek_looks_at_one_window_and_laps_are_counted_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = draws_of([[0.25] * 50] * 40)
    looked_at: list[int] = []
    rates = draws.balance.rates

    def noted(shard: int) -> np.ndarray:
        looked_at.append(shard)
        return rates(shard)

    object.__setattr__(draws.balance, "rates", noted)
    assert draws.samples(0, 7.0) == draws.start(7)
    draws.lap_at(draws.start(7) + 100)
    assert sorted(looked_at) == list(range(40)), "once each, for all laps of all epochs"
    looked_at.clear()
    order = BalancedOrder(draws, 4, seed=0)
    position = draws.start(6) + 100
    order.locate(position)
    assert sorted(looked_at) == sorted(order.windows_at(position)[0])


def test_rates_that_draw_nothing_are_refused() -> None:
    for rates in ([0.0] * 4, [1e-6] * 4):
        with pytest.raises(UserError, match="draws less than one sample per epoch"):
            draws_of([rates])
