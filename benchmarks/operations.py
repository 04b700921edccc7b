"""What a step asks of a GPU, counted without one: kernels it launches, and moments at which the host waits for it.

On a CPU every operation passes the same dispatcher. One that computes or copies is a kernel; a view, or memory that is
set aside, is none. One whose result the host reads, or that brings a new value from the host, is a wait; so is a call
that waits for the device, an event or a stream, which does nothing on a CPU. Attention of variable length has no CPU
kernel: in its place stands one that launches as many.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


def reason_to_wait(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Why the host would wait in an operation: a value or a shape that it reads, a constant that it copies over."""
    name: str = operation.overloadpacket.__name__
    indices = args[1] if name in ("index", "index_put", "index_put_") else []
    if name in _WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    return "a copy of a constant" if name == "lift_fresh" else None


def is_kernel(operation: Any) -> bool:
    """Whether an operation computes or copies anything."""
    returns = operation._schema.returns
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    return not is_view and operation.overloadpacket.__name__ not in _NO_KERNEL and operation.namespace == "aten"


class CountOperations(TorchDispatchMode):
    """Counts, by name, within a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> CountOperations:
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(counting_synchronization(self.waits))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counted, then done as ever."""
        reason = reason_to_wait(func, args, kwargs or {})
        if reason:
            self.waits[reason] += 1
        if is_kernel(func):
            self.kernels[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting_synchronization(waits: Counter[str] | None = None) -> Iterator[Counter[str]]:
    """Count calls that ask the device to finish, DeepSpeed's timers among them, as "synchronize"."""
    from deepspeed.accelerator import get_accelerator

    found = Counter[str]() if waits is None else waits

    def count(*args: Any, **kwargs: Any) -> None:
        found["synchronize"] += 1

    with contextlib.ExitStack() as stack:
        for owner in (type(get_accelerator()), torch.cuda, torch.cuda.Event, torch.cuda.Stream, torch.cpu):
            stack.enter_context(mock.patch.object(owner, "synchronize", count))
        yield found


class _OneKernelEachWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.shapes = query.shape, key.shape
        return query.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [ctx.shapes[0], ctx.shapes[1], ctx.shapes[1]]
        zeros = grads[0].new_zeros(sum(shape.numel() for shape in shapes))  # one kernel for the three
        query, key, value = zeros.split([shape.numel() for shape in shapes])
        return query.view(shapes[0]), key.view(shapes[1]), value.view(shapes[2])


def without_flash_attention() -> Any:
    """A context in which attention of variable length computes nothing, with as many kernels and the right shapes."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _OneKernelEachWay.apply(query, key, value)

    return mock.patch.object(varlen, "varlen_attn", attend)
