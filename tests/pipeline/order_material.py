"""Reading an order of samples as a run does that is started several times, each time with other ranks and workers."""

from __future__ import annotations

import pickle

from hypothesis import strategies as st

from pipeline.data.data_loader import MicroBatches
from pipeline.data.sample_order import BatchPlan, MixedOrder

Place = tuple[int, int]  # (shard, index within it)
Start = tuple[int, int, int, int, int]  # ranks, micro-batch, accumulation, workers, steps


@st.composite
def starts_of_a_run(draw: st.DrawFn) -> list[Start]:
    """Each start of a run."""
    start = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 5))
    return draw(st.lists(start, min_size=1, max_size=4))


def read_all(order: MixedOrder, starts: list[Start]) -> list[Place]:
    """What all starts together read, rank after rank of each micro-batch; all ranks take equal steps."""
    read: list[Place] = []
    step = 0
    for ranks, micro, accumulation, workers, steps in starts:
        plan = BatchPlan(order.num_samples, ranks * micro * accumulation, micro, ranks, step, len(read))
        of_ranks = [
            _read_by_workers(order, MicroBatches(plan, rank, step, step + steps), workers) for rank in range(ranks)
        ]
        assert {len(batches) for batches in of_ranks} == {steps * accumulation}, "ranks take equal steps"
        assert {len(batch) for batches in of_ranks for batch in batches} <= {micro}
        for number in range(steps * accumulation):
            read += [place for rank in range(ranks) for place in of_ranks[rank][number]]
        step += steps
    return read


def _read_by_workers(order: MixedOrder, sampler: MicroBatches, workers: int) -> list[list[Place]]:
    """What a rank gets: each worker has an order of its own and every so many-th micro-batch."""
    own = [pickle.loads(pickle.dumps(order)) for _ in range(max(1, workers))]
    return [
        [own[number % len(own)].locate(position) for position in positions] for number, positions in enumerate(sampler)
    ]
