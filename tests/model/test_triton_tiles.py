"""The fused kernels in Triton's interpreter equal torch's tiles; and they compile for GPUs that are not here."""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.loss import ContrastiveLoss, LossKind, PairLoss, Tiles, TorchTiles

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """Calls a function in a process whose Triton interprets: that is decided when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        yield lambda function, *arguments: pool.apply(function, arguments)


def features(R: int, C: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(R + C)
    rows, columns = torch.randn(R, D, generator=generator), torch.randn(C, D, generator=generator)
    return F.normalize(rows, dim=-1), F.normalize(columns, dim=-1)


def all_sums(tiles: Tiles, R: int, C: int, D: int, scale: float) -> list[Tensor]:
    """Everything that Tiles compute, with the log-sum-exps of torch for the weights."""
    rows, columns = features(R, C, D)
    numbers = torch.tensor([scale]), torch.tensor([-10.0])
    into_softmax, into_sigmoid = torch.ones(2, R, D)  # sums are added to what is there
    lses = TorchTiles().logsumexp(rows, columns, numbers[0])
    at_columns = tiles.add_softmax_sums(rows, columns, numbers[0], *lses, into_softmax)
    sums = tiles.add_sigmoid_sums(rows, columns, *numbers, into_sigmoid)
    return [*tiles.logsumexp(rows, columns, numbers[0]), into_softmax, at_columns, into_sigmoid, *sums]


def fused_sums(programs: int, *arguments: Any) -> list[Tensor]:
    kernels: Any = importlib.import_module("model.kernels.triton_tiles")
    kernels._PROGRAMS, kernels._ROWS_AT_ONCE = programs, 32
    return all_sums(kernels.TritonTiles(32, 16, 16), *arguments)


# neither side nor the width a multiple of a tile's; fewer than a tile; columns split among few and many programs
SHAPES = [(40, 50, 24, 1), (33, 70, 16, 8), (16, 32, 16, 2), (1, 5, 3, 99)]


@pytest.mark.parametrize(("R", "C", "D", "programs"), SHAPES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_interpreted_kernels_equal_torch(
    interpreted: Call, R: int, C: int, D: int, programs: int, scale: float
) -> None:
    found = interpreted(fused_sums, programs, R, C, D, scale)
    for fused, plain in zip(found, all_sums(TorchTiles(64), R, C, D, scale), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def loss_on(tiles: Tiles, kind: LossKind) -> PairLoss:
    return ContrastiveLoss(kind, tiles=tiles).evaluate(
        *features(24, 24, 16), torch.tensor([20.0]), torch.tensor([-3.0])
    )


def fused_loss(kind: LossKind) -> PairLoss:
    return loss_on(importlib.import_module("model.kernels.triton_tiles").TritonTiles(16, 16, 16), kind)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_a_whole_loss_on_interpreted_kernels(interpreted: Call, kind: LossKind) -> None:
    torch.testing.assert_close(interpreted(fused_loss, kind), loss_on(TorchTiles(), kind), rtol=1e-5, atol=1e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from model.kernels.triton_tiles import TritonTiles, _logsumexp_kernel, _sums_kernel

tiles = TritonTiles()
blocks = {"BLOCK_R": tiles.block_rows, "BLOCK_C": tiles.block_columns, "BLOCK_D": tiles.block_width}
for kernel, more in ((_logsumexp_kernel, {}), (_sums_kernel, {"SIGMOID": False}), (_sums_kernel, {"SIGMOID": True})):
    constants = {**blocks, **more}
    integers = {"R", "C", "D", "columns_per_split"}
    types = {name: "constexpr" if name in constants else "i32" if name in integers else "*fp32"
             for name in kernel.arg_names}
    for capability in (80, 90):
        source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        print(compiled.metadata.shared, len(compiled.asm["cubin"]))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(sizes) == 6
    assert all(shared <= 96 * 1024 and code > 1000 for shared, code in sizes)  # bytes; any of these GPUs has so many
