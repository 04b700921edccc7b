"""Drawing masks, gathering patches and the forward pass: the host launches work and never asks for a result.

On a CPU the operations that would make it wait are refused; on a GPU torch itself refuses to wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from model.clip import CLIP, CLIPOutput
from model.config import config_from_name
from model.masking import STRATEGIES, MaskingConfig
from model.packing import PackedTokens, lengths_to_cu_seqlens, pack_tokens
from pipeline.ranks import Ranks
from pipeline.training.mask_drawer import MaskDrawer

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


def captions(device: str) -> PackedTokens:
    lengths = torch.tensor([5, 3, 8, 4, 20, 2])
    tokens = torch.arange(1, int(lengths.sum()) + 1)
    return pack_tokens(tokens.to(device), lengths_to_cu_seqlens(lengths).to(device), 20)


def forward(clip: CLIP, drawer: MaskDrawer, pixels: Tensor, text: PackedTokens) -> CLIPOutput:
    images, masks = drawer.draw(pixels, step=1, micro_batch=0, progress=0.5)
    with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
        output: CLIPOutput = clip(images.gather(masks.selection.kept_K), masks.selection, text)
    return output


def make(device: str, strategy: str) -> tuple[CLIP, MaskDrawer, Tensor, PackedTokens]:
    torch.manual_seed(0)
    clip = CLIP(config_from_name("ViT-test-8")).to(device)
    clip.use_backend("varlen")
    mix = 0.5 if strategy == "cluster" else 0.0
    ranks = Ranks(0, 0, 1, torch.device(device))
    drawer = MaskDrawer(MaskingConfig(strategy, embedding_mix=mix), clip.visual, 8, seed=0, ranks=ranks)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=Generator().manual_seed(0))
    return clip, drawer, pixels.to(device), captions(device)


@pytest.mark.parametrize("strategy", NEVER_WAIT)
def test_no_operation_needs_the_host(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *args, **kwargs: query.clone())
    step = make("cpu", strategy)
    with RefuseToWait():
        output = forward(*step)
    assert output.image_features.shape == (6, 32)


def test_what_waits_is_refused() -> None:
    """The check can fail: the buckets read lengths, and the released code's behaviour reads counts."""
    clip, drawer, pixels, text = make("cpu", "random")
    clip.use_backend("buckets")
    with pytest.raises(RuntimeError, match="would wait in _local_scalar_dense"), RefuseToWait():
        forward(clip, drawer, pixels, text)
    clip, drawer, pixels, _ = make("cpu", "cluster-reference")
    with pytest.raises(RuntimeError, match="would wait"), RefuseToWait():
        drawer.draw(pixels, 1, 0, 0.5)
    x = torch.ones(3)
    for wait in (lambda: torch.tensor([1.0, 2.0]), lambda: x[x > 0], lambda: x.repeat_interleave(x.long())):
        with pytest.raises(RuntimeError, match="would wait"), RefuseToWait():
            wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", NEVER_WAIT)
def test_a_gpu_never_makes_the_host_wait(strategy: str) -> None:
    step = make("cuda", strategy)
    forward(*step)  # libraries load and memory is reserved the first time
    torch.cuda.synchronize()
    with cuda_refuses_to_wait():
        output = forward(*step)
    assert output.image_features.isfinite().all()
