"""The order of samples: each once per epoch, whatever the ranks; shuffled; the same for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sample_order import BatchPlan, SampleOrder


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    window=st.integers(1, 13),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_stands_at_exactly_one_position(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = SampleOrder(tuple(sizes), window, seed)
    places = [order.locate(epoch * order.num_samples + position) for position in range(order.num_samples)]
    assert sorted(places) == [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    # a window's samples stand together: no more than `window` shards are open at a time
    first_seen = list(dict.fromkeys(shard for shard, _ in places))
    for start in range(0, len(first_seen), 1):
        positions = [i for i, (shard, _) in enumerate(places) if shard == first_seen[start]]
        assert len({places[i][0] for i in range(positions[0], positions[-1] + 1)}) <= window


def test_epochs_and_seeds_differ_and_shuffling_is_real() -> None:
    order = SampleOrder((50, 50, 50), 3, seed=0)
    sequences = [
        [SampleOrder((50, 50, 50), 3, seed).locate(150 * epoch + p) for p in range(150)]
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert sequences[0] == [order.locate(p) for p in range(150)]
    assert all(a != b for a in sequences for b in sequences if a is not b)
    # the shards' own order changes too, with windows of one shard
    shard_orders = {
        tuple(SampleOrder((9,) * 12, 1, 0).locate(108 * epoch + p)[0] for p in range(108)) for epoch in range(3)
    }
    assert len(shard_orders) == 3
    neighbours = sum(abs(a[1] - b[1]) <= 1 for a, b in zip(sequences[0], sequences[0][1:], strict=False))
    assert neighbours < 20


@given(samples=st.integers(1, 400), ranks=st.integers(1, 5), micro=st.integers(1, 6), accumulation=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_ranks_share_the_stream_without_gap_or_overlap(samples: int, ranks: int, micro: int, accumulation: int) -> None:
    plan = BatchPlan(samples, ranks * micro * accumulation, micro, ranks, first_step=7, first_position=3 * samples)
    assert plan.accumulation_steps == accumulation
    steps = range(7, 27)
    read = [
        p for s in steps for a in range(accumulation) for rank in range(ranks) for p in plan.micro_batch(s, a, rank)
    ]
    assert read == list(range(3 * samples, 3 * samples + 20 * plan.global_batch_size))


def test_a_step_reads_the_same_samples_at_any_world_size() -> None:
    for step in range(10):
        seen = set()
        for ranks, micro, accumulation in [(1, 24, 1), (2, 12, 1), (3, 4, 2), (4, 6, 1), (1, 3, 8)]:
            plan = BatchPlan(100, 24, micro, ranks)
            of_ranks = (plan.micro_batch(step, a, rank) for a in range(accumulation) for rank in range(ranks))
            seen.add(tuple(position for positions in of_ranks for position in positions))
        assert len(seen) == 1
