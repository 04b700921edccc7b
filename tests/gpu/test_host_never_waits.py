"""From masks to the update and the report of a step: the host launches work and never asks for a result.

On a CPU the operations that would make it wait are refused; on a GPU torch itself refuses to wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from model.clip import CLIP
from model.config import Pool, config_from_name
from model.loss import Objective
from model.masking import STRATEGIES, MaskingConfig
from model.packing import lengths_to_cu_seqlens
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.faults.step_guard import StepGuard, spread_non_finite
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.train_step import Encoded, _report

# `cluster-reference` asks how many patches are kept, as the released code does
NEVER_WAIT = sorted(set(STRATEGIES) - {"cluster-reference"})
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}


class RefuseToWait(TorchDispatchMode):
    """Raises where a GPU would make the host wait: values read, shapes that depend on them, constants copied over."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"the host would wait in {name}")
        if name == "lift_fresh":
            raise RuntimeError("the host would wait for a copy of a constant")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise RuntimeError("the host would wait in repeat_interleave")
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_refuses_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Step(NamedTuple):
    """What a step of one rank works with."""

    clip: CLIP
    drawer: MaskDrawer
    batch: Batch
    ranks: Ranks
    optimizer: torch.optim.Optimizer
    guard: StepGuard


def run(step: Step) -> Tensor:
    """All of a training step but DeepSpeed: masks, forward, loss, backward, guarded update, moving average, report."""
    images, masks = step.drawer.draw(step.batch.images_BCHW, step=1, micro_batch=0, progress=0.5)
    with torch.autocast(step.ranks.device.type, dtype=torch.bfloat16):
        output = step.clip(images.gather(masks.selection.kept_K), masks.selection, step.batch.text)
    loss = Objective()(*output)
    spread_non_finite(loss).backward()
    step.optimizer.step()
    step.drawer.follow()
    report = _report(loss, Encoded(step.batch, images, masks, output))
    step.guard.end_step(1, report[0], [step.batch])
    return report


def make(device: str, strategy: str, pool: Pool = "class") -> Step:
    torch.manual_seed(0)
    config = config_from_name("ViT-test-8")
    clip = CLIP(replace(config, vision=replace(config.vision, pool=pool))).to(device)
    clip.use_backend("varlen")
    mix = 0.5 if strategy == "cluster" else 0.0
    ranks = Ranks(0, 0, 1, torch.device(device))
    drawer = MaskDrawer(MaskingConfig(strategy, embedding_mix=mix), clip.visual, 8, seed=0, ranks=ranks)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=Generator().manual_seed(0))
    lengths = torch.tensor([5, 3, 8, 4, 20, 2])
    tokens = torch.arange(1, int(lengths.sum()) + 1)
    batch = Batch(pixels, tokens, lengths_to_cu_seqlens(lengths), 20, [], [])
    optimizer = torch.optim.AdamW(clip.parameters(), fused=True)
    engine = SimpleNamespace(module=clip, basic_optimizer=optimizer, optimizer=optimizer, fp16_enabled=lambda: False)
    return Step(clip, drawer, batch.to(ranks.device), ranks, optimizer, StepGuard(engine, ranks))


CASES = [(strategy, "class") for strategy in NEVER_WAIT] + [("cluster", "average"), ("cluster", "attention")]


@pytest.mark.parametrize(("strategy", "pool"), CASES)
def test_no_operation_needs_the_host(strategy: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *args, **kwargs: query.clone())
    step = make("cpu", strategy, pool)
    with RefuseToWait():
        report = run(step)
    assert report[0].isfinite()
    assert step.clip.visual.proj.grad is not None
    assert not step.guard.read()[0].skipped


def test_what_waits_is_refused() -> None:
    """The check can fail: the buckets read lengths, and the released code's behaviour reads counts."""
    step = make("cpu", "random")
    step.clip.use_backend("buckets")
    with pytest.raises(RuntimeError, match="would wait in _local_scalar_dense"), RefuseToWait():
        run(step)
    step = make("cpu", "cluster-reference")
    with pytest.raises(RuntimeError, match="would wait"), RefuseToWait():
        step.drawer.draw(step.batch.images_BCHW, 1, 0, 0.5)
    x = torch.ones(3)
    for wait in (lambda: torch.tensor([1.0, 2.0]), lambda: x[x > 0], lambda: x.repeat_interleave(x.long())):
        with pytest.raises(RuntimeError, match="would wait"), RefuseToWait():
            wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("strategy", "pool"), CASES)
def test_a_gpu_never_makes_the_host_wait(strategy: str, pool: Pool) -> None:
    step = make("cuda", strategy, pool)
    run(step)  # libraries load and memory is reserved the first time
    torch.cuda.synchronize()
    with cuda_refuses_to_wait():
        report = run(step)
    assert report[0].isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_vote_does_not_wait_for_the_gpu() -> None:
    """NCCL of one rank, which believes that there is another."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = Ranks(0, 0, 2, torch.device("cuda", 0))
        assert ranks.start_maximum([3, -4]).read() == [3, -4]
        with cuda_refuses_to_wait():
            pending = ranks.start_maximum([5, -6])
        assert pending.read() == [5, -6]
    finally:
        dist.destroy_process_group()
