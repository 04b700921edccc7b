"""Steps whose tensors and collectives are counted, on a CPU: what the closed forms predict; nothing is saved."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.stage_plan import Stage
from pipeline.training.train_step import make_learner, train_step
from pipeline.training.weights.stage_model import make_model

_MARK = "planning/"
_OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "alltoall_base_": "all_to_all",
}


class Mark(NamedTuple):
    """Bytes alive at a moment, and the most that were alive since the mark before."""

    name: str
    live_bytes: int
    peak_bytes: int


class TensorMemory:
    """Every allocation and release of CPU tensors within a `with` block, temporaries of operations included.

    Unlike the process's size it depends on neither the allocator nor the libraries: the same run gives the same bytes.
    Copies that gloo's threads make for themselves are left out, since NCCL makes none.
    """

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start and stop
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.marks: list[Mark] = []

    def __enter__(self) -> TensorMemory:
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mark("end")
        self._profile.__exit__(kind, error, trace)
        self.marks = _read_marks(self._profile)

    def mark(self, name: str) -> None:
        """Name this moment; its figures are in `marks` after the block."""
        with record_function(_MARK + name):
            pass

    @property
    def peak_bytes(self) -> int:
        """The most that were alive at once."""
        return max(mark.peak_bytes for mark in self.marks)


def _read_marks(finished: profile) -> list[Mark]:
    profiler: Any = finished.profiler
    events = sorted(_flatten(profiler.kineto_results.experimental_event_tree()), key=lambda event: event.start_time_ns)
    own_thread = next(event.start_tid for event in events if event.name.startswith(_MARK))
    marks: list[Mark] = []
    sizes: dict[int, int] = {}
    live = peak = 0
    for event in events:
        if event.name == "[memory]":
            pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
            if size < 0:
                live -= sizes.pop(pointer, 0)
            elif event.start_tid == own_thread:
                sizes[pointer] = size
                live += size
            peak = max(peak, live)
        elif event.name.startswith(_MARK):
            marks.append(Mark(event.name.removeprefix(_MARK), live, peak))
            peak = live
    return marks


def _flatten(events: Sequence[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


class CollectiveVolume(TorchDispatchMode):
    """Payload bytes by operation, of whoever calls torch.distributed: the whole tensor that is reduced or gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counted, then done as ever."""
        if function.namespace == "c10d" and function.__name__ != "recv_.default":  # what another rank's send counts
            name = function.__name__.partition(".")[0]
            operation = _OPERATIONS.get(name, name)
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.payload_bytes[operation] += _payload(operation, sizes)
            self.calls[operation] += 1
        return function(*args, **(kwargs or {}))


def _payload(operation: str, sizes: Sequence[int]) -> int:
    if operation in ("all_gather", "reduce_scatter"):
        # of the two sides the whole one; in a coalesced call each is a list
        return sum(sizes) - min(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
    return sum(sizes)


@dataclass(frozen=True)
class Trial:
    """What one rank's last step took.

    weight_bytes, resting_bytes, peak_bytes: of the model's parameters, of all tensors between steps, and at most in a
    step, one micro-batch of images and captions included
    payload_bytes, calls: by collective
    setup_s, step_s: of model and engine, and of the step
    """

    weight_bytes: int
    resting_bytes: int
    peak_bytes: int
    payload_bytes: Counter[str]
    calls: Counter[str]
    setup_s: float
    step_s: float


def try_steps(stage: Stage, config: dict[str, Any], ranks: Ranks, steps: Sequence[Sequence[Batch]]) -> Trial:
    """Make the stage's model and engine and take steps with these micro-batches; the figures are the last one's.

    Two steps at least: optimizer states appear in the first, in which DeepSpeed also learns what stage 3 needs when.
    """
    start_s = time.perf_counter()
    with TensorMemory() as memory:
        clip = make_model(stage, None, ranks.device)
        learner = make_learner(stage, clip, config, ranks)
        setup_s = time.perf_counter() - start_s
        for step, micro_batches in enumerate(steps, start=stage.first_step):
            memory.mark("rest")
            start_s = time.perf_counter()
            with CollectiveVolume() as volume:
                train_step(learner, micro_batches, step, stage.progress(step), stage.num_taught(step))
            step_s = time.perf_counter() - start_s
            memory.mark("step")
    weight_bytes = sum(parameter.nbytes for parameter in clip.parameters())
    learner.engine.release()
    del learner
    resting, stepped = [mark for mark in memory.marks if mark.name in ("rest", "step")][-2:]
    return Trial(
        weight_bytes,
        resting.live_bytes,
        stepped.peak_bytes + _bytes(steps[-1][0]),
        volume.payload_bytes,
        volume.calls,
        setup_s,
        step_s,
    )


def _bytes(batch: Batch) -> int:
    return batch.images_BCHW.nbytes + batch.tokens_N.nbytes + batch.cu_seqlens_B1.nbytes
