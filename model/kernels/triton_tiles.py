"""Sums over a rectangle of the logits matrix in fused Triton kernels (model.loss.Tiles): logits stay on the chip.

R rows, C columns, D width; r, c rows and columns of a tile, d a slice of the width.
Products are made of three in TF32, which is fp32 but for the last bits. Nothing is added up atomically: the same input
gives the same bits. A program owns rows; sums for the columns are the same kernel with the sides swapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Partial sums per column take a 2,048th of the matrix of that many rows.
_ROWS_AT_ONCE = 8192
# Programs in which a kernel is started at least, where the rectangle is large enough.
_PROGRAMS = 256
# Instead of -inf: the difference of two is a number.
_OUTSIDE = tl.constexpr(-1e30)


@triton.jit
def _cosines_tile(
    rows, columns, row_r, column_c, R, C, D,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines of a tile, [r, c]; 0 beyond the rectangle."""
    cosine_rc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        width_d = start + tl.arange(0, BLOCK_D)
        inside_d = width_d < D
        rows_rd = tl.load(rows + row_r[:, None].to(tl.int64) * D + width_d, (row_r < R)[:, None] & inside_d, 0.0)
        columns_cd = tl.load(
            columns + column_c[:, None].to(tl.int64) * D + width_d, (column_c < C)[:, None] & inside_d, 0.0
        )
        cosine_rc = tl.dot(rows_rd, tl.trans(columns_cd), cosine_rc, input_precision="tf32x3")
    return cosine_rc


@triton.jit
def _logsumexp_kernel(
    rows, columns, scale, row_parts, column_parts, R, C, D, columns_per_split,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps: of this program's rows over its columns, [splits, R], and of each column over them, [blocks, C]."""
    block, split = tl.program_id(0), tl.program_id(1)
    row_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    largest_r = tl.full((BLOCK_R,), _OUTSIDE, tl.float32)
    sum_r = tl.zeros((BLOCK_R,), tl.float32)
    first = split * columns_per_split
    for start in range(first, min(first + columns_per_split, C), BLOCK_C):
        column_c = start + tl.arange(0, BLOCK_C)
        logit_rc = tl.load(scale) * _cosines_tile(rows, columns, row_r, column_c, R, C, D, BLOCK_R, BLOCK_C, BLOCK_D)
        inside_rc = (row_r < R)[:, None] & (column_c < C)[None, :]
        logit_rc = tl.where(inside_rc, logit_rc, _OUTSIDE)

        column_largest_c = tl.max(logit_rc, 0)
        column_sum_c = tl.sum(tl.exp(logit_rc - column_largest_c[None, :]), 0)
        tl.store(
            column_parts + block.to(tl.int64) * C + column_c, column_largest_c + tl.log(column_sum_c), column_c < C
        )
        new_largest_r = tl.maximum(largest_r, tl.max(logit_rc, 1))
        sum_r = sum_r * tl.exp(largest_r - new_largest_r) + tl.sum(tl.exp(logit_rc - new_largest_r[:, None]), 1)
        largest_r = new_largest_r
    tl.store(row_parts + split.to(tl.int64) * R + row_r, largest_r + tl.log(sum_r), row_r < R)


@triton.jit
def _sums_kernel(
    rows, columns, scale, bias, row_lse, column_lse, into, softplus_parts, sigmoid_parts, R, C, D, columns_per_split,
    SIGMOID: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """into[split] += w @ columns for this program's rows and columns; for the sigmoid sums per row, [splits, R]."""
    block, split = tl.program_id(0), tl.program_id(1)
    row_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_r = row_r < R
    into += split.to(tl.int64) * R * D
    softplus_r = tl.zeros((BLOCK_R,), tl.float32)
    sigmoid_r = tl.zeros((BLOCK_R,), tl.float32)
    first = split * columns_per_split
    for start in range(first, min(first + columns_per_split, C), BLOCK_C):
        column_c = start + tl.arange(0, BLOCK_C)
        inside_c = column_c < C
        logit_rc = tl.load(scale) * _cosines_tile(rows, columns, row_r, column_c, R, C, D, BLOCK_R, BLOCK_C, BLOCK_D)
        if SIGMOID:
            logit_rc += tl.load(bias)
            small_rc = tl.exp(-tl.abs(logit_rc))
            # log(1 + small) without losing what is small (Kahan)
            one_more_rc = 1.0 + small_rc
            is_lost_rc = one_more_rc == 1.0
            log1p_rc = tl.log(one_more_rc) * small_rc / tl.where(is_lost_rc, 1.0, one_more_rc - 1.0)
            log1p_rc = tl.where(is_lost_rc, small_rc, log1p_rc)
            softplus_rc = tl.maximum(logit_rc, 0.0) + log1p_rc
            weight_rc = tl.where(logit_rc > 0, 1.0, small_rc) / one_more_rc
            softplus_r += tl.sum(tl.where(inside_c[None, :], softplus_rc, 0.0), 1)
            sigmoid_r += tl.sum(tl.where(inside_c[None, :], weight_rc, 0.0), 1)
        else:
            row_lse_r = tl.load(row_lse + row_r, inside_r, 0.0)
            column_lse_c = tl.load(column_lse + column_c, inside_c, 0.0)
            weight_rc = tl.exp(logit_rc - row_lse_r[:, None]) + tl.exp(logit_rc - column_lse_c[None, :])
        weight_rc = tl.where(inside_r[:, None] & inside_c[None, :], weight_rc, 0.0)
        for width in range(0, D, BLOCK_D):
            width_d = width + tl.arange(0, BLOCK_D)
            inside_d = width_d < D
            columns_cd = tl.load(
                columns + column_c[:, None].to(tl.int64) * D + width_d, inside_c[:, None] & inside_d, 0.0
            )
            into_rd = into + row_r[:, None].to(tl.int64) * D + width_d
            inside_rd = inside_r[:, None] & inside_d
            sum_rd = tl.dot(weight_rc, columns_cd, tl.load(into_rd, inside_rd, 0.0), input_precision="tf32x3")
            tl.store(into_rd, sum_rd, inside_rd)
        tl.debug_barrier()  # the next tile's loads see this one's stores, whichever thread makes them
    if SIGMOID:
        tl.store(softplus_parts + split.to(tl.int64) * R + row_r, softplus_r, inside_r)
        tl.store(sigmoid_parts + split.to(tl.int64) * R + row_r, sigmoid_r, inside_r)


@dataclass(frozen=True)
class TritonTiles:
    """Tiles on a CUDA device, for features in fp32; the blocks are powers of two, at least 16."""

    block_rows: int = 128
    block_columns: int = 128
    block_width: int = 32
    warps: int = 8

    def logsumexp(self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See Tiles."""
        row_lses, column_lse_C = [], columns_CD.new_full((len(columns_CD),), -torch.inf)
        for part_RD in rows_RD.split(_ROWS_AT_ONCE):
            row_lse_R, part_C = self._logsumexp(part_RD, columns_CD, scale)
            row_lses.append(row_lse_R)
            column_lse_C = torch.logaddexp(column_lse_C, part_C)
        return torch.cat(row_lses), column_lse_C

    def _logsumexp(self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        (R, D), C = rows_RD.shape, len(columns_CD)
        blocks, splits, columns_per_split = self._grid(R, C)
        row_parts = rows_RD.new_empty(splits, R)
        column_parts = rows_RD.new_empty(blocks, C)
        _logsumexp_kernel[blocks, splits](
            rows_RD, columns_CD, scale, row_parts, column_parts, R, C, D, columns_per_split,
            self.block_rows, self.block_columns, self.block_width, num_warps=self.warps,
        )  # fmt: skip
        return row_parts.logsumexp(0), column_parts.logsumexp(0)

    def add_softmax_sums(
        self,
        rows_RD: Tensor,
        columns_CD: Tensor,
        scale: Tensor,
        row_lse_R: Tensor,
        column_lse_C: Tensor,
        into_rows_RD: Tensor,
    ) -> Tensor:
        """See Tiles."""
        self._add_sums(rows_RD, columns_CD, scale, (row_lse_R, column_lse_C), None, into_rows_RD)
        at_columns_CD = torch.zeros_like(columns_CD)
        self._add_sums(columns_CD, rows_RD, scale, (column_lse_C, row_lse_R), None, at_columns_CD)
        return at_columns_CD

    def add_sigmoid_sums(
        self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor, bias: Tensor, into_rows_RD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Tiles."""
        softplus_R, sigmoid_R = self._add_sums(rows_RD, columns_CD, scale, None, bias, into_rows_RD)
        at_columns_CD = torch.zeros_like(columns_CD)
        self._add_sums(columns_CD, rows_RD, scale, None, bias, at_columns_CD)
        return softplus_R, sigmoid_R, at_columns_CD

    def _add_sums(
        self,
        rows_RD: Tensor,
        columns_CD: Tensor,
        scale: Tensor,
        lses: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        into_RD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Weights of the softmax with `lses` of rows and columns, of the sigmoid with `bias`; its sums per row."""
        (R, D), C = rows_RD.shape, len(columns_CD)
        blocks, splits, columns_per_split = self._grid(R, C)
        softplus_parts, sigmoid_parts = rows_RD.new_zeros(2, splits, R if bias is not None else 0)
        parts = into_RD if splits == 1 else into_RD.new_zeros(splits, R, D)
        row_lse_R, column_lse_C = lses or (scale, scale)  # not read
        _sums_kernel[blocks, splits](
            rows_RD, columns_CD, scale, scale if bias is None else bias, row_lse_R, column_lse_C, parts,
            softplus_parts, sigmoid_parts, R, C, D, columns_per_split,
            bias is not None, self.block_rows, self.block_columns, self.block_width, num_warps=self.warps,
        )  # fmt: skip
        if splits > 1:
            into_RD += parts.sum(0)
        return softplus_parts.sum(0), sigmoid_parts.sum(0)

    def _grid(self, R: int, C: int) -> tuple[int, int, int]:
        """Blocks of rows, and into how many parts the columns are split so that all of the device is busy."""
        blocks = triton.cdiv(R, self.block_rows)
        splits = min(triton.cdiv(_PROGRAMS, blocks), triton.cdiv(C, self.block_columns))
        per_split = triton.cdiv(triton.cdiv(C, splits), self.block_columns) * self.block_columns
        return blocks, triton.cdiv(C, per_split), per_split
