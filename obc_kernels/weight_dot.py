"""weight_dot: the sums of weight times gradient per row and per column of the weight, from one pass over both.

    row_dot[r]       = sum over columns k, kernel s of w[r, k, s] * g[r, k, s]
    column_dot[g, k] = sum over rows r of group g, kernel s of w[r, k, s] * g[r, k, s]

Shapes: weight and grad (rows, K, *kernel), any strides, each its own; rows = groups * rows per group. Rows are the
out channels and columns the in channels, the other way round with ``transposed``; b * gb is added to the out sums.
Bytes: both inputs once, plus two kinds of partial sums (a fraction 1 / columns of a tile and 1 / rows of a program
of the input) written and read once.
Accumulation: float32, float64 for float64 input. Deterministic: fixed tiles, whose partial sums a second kernel
adds in a fixed order; the split depends on shape and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import autotune
from obc_kernels.case import Case, empty
from obc_kernels.launch import launch
from obc_kernels.layout import (
    VECTOR_BYTES,
    Axis,
    accumulator,
    aligned,
    ceil_div,
    check_steps,
    merged_axes,
    outer_offset,
    power_of_two,
    run_elements,
    tile_elements,
)

# Loads element by element need an address each: half a tile of them, and more registers than the vectors take, or
# older versions of Triton spill.
ADDRESS_REGISTERS = 255


@triton.jit
def weight_dot_kernel(
    row_ptr,  # (column_blocks, rows)
    column_ptr,  # (groups, row_splits, columns)
    w_ptr,
    g_ptr,
    program,  # None: the launch's own
    groups,
    rows_per_group,
    columns,
    size_1,
    size_2,
    column_blocks,
    row_splits,
    tiles_per_split,
    stride_wr,
    stride_w0,
    stride_w1,
    stride_w2,
    stride_gr,
    stride_g0,
    stride_g1,
    stride_g2,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program's partial sums: ``BLOCK_M`` columns of ``BLOCK_G`` groups, down ``tiles_per_split`` tiles of rows."""
    if program is None:
        program = tl.program_id(0)
    column_block = (program % column_blocks).to(tl.int64)
    split = program // column_blocks % row_splits
    group_block = (program // column_blocks // row_splits).to(tl.int64)

    g = group_block * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    m = column_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = aligned(columns, ALIGN)
    if FLAT:
        w_column = m
        g_column = m
    else:
        w_column = outer_offset(m, size_1, size_2, stride_w0, stride_w1, stride_w2)
        g_column = outer_offset(m, size_1, size_2, stride_g0, stride_g1, stride_g2)
    m_mask = m < columns
    column_acc = tl.zeros((BLOCK_G, BLOCK_R, BLOCK_M), dtype=row_ptr.dtype.element_ty)
    tiles = tl.cdiv(rows_per_group, BLOCK_R)
    for tile in range(split * tiles_per_split, tl.minimum(tiles, (split + 1) * tiles_per_split)):
        r = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)  # [BLOCK_R], within the group
        row = g[:, None] * rows_per_group + r[None, :]  # [BLOCK_G, BLOCK_R]
        row_mask = (g < groups)[:, None] & (r < rows_per_group)[None, :]
        mask = row_mask[:, :, None] & m_mask[None, None, :]
        w_offset = (row * aligned(stride_wr, ALIGN))[:, :, None] + w_column[None, None, :]
        g_offset = (row * aligned(stride_gr, ALIGN))[:, :, None] + g_column[None, None, :]
        w = tl.load(w_ptr + w_offset, mask=mask, other=0.0).to(column_acc.dtype)
        wg = w * tl.load(g_ptr + g_offset, mask=mask, other=0.0).to(column_acc.dtype)
        column_acc += wg
        tl.store(row_ptr + column_block * groups * rows_per_group + row, tl.sum(wg, axis=2), mask=row_mask)
    out = column_ptr + ((g * row_splits + split) * columns)[:, None] + m[None, :]
    tl.store(out, tl.sum(column_acc, axis=1), mask=(g < groups)[:, None] & m_mask[None, :])


@triton.jit
def finished_sums(
    partial_ptr,
    i,
    count,
    inner,
    stride_outer,
    stride_inner,
    splits,
    stride_split,
    positions,
    stride_position,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The outputs ``i`` [BLOCK_N] below ``count``: their partial sums over splits and positions, in that order."""
    base = i // inner * stride_outer + i % inner * stride_inner
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=partial_ptr.dtype.element_ty)
    for first in range(0, splits * positions, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        term = (t // positions).to(tl.int64) * stride_split + (t % positions).to(tl.int64) * stride_position
        mask = (t < splits * positions)[:, None] & (i < count)[None, :]
        acc += tl.load(partial_ptr + term[:, None] + base[None, :], mask=mask, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def _weight_dot_finish_kernel(
    row_dot_ptr,
    column_dot_ptr,
    row_ptr,  # (column_blocks, rows)
    column_ptr,  # (groups, row_splits, columns)
    bias_ptr,
    bias_grad_ptr,
    rows,
    row_terms,
    groups,
    channels,
    columns,
    row_splits,
    positions,
    stride_channel,
    stride_position,
    stride_b,
    stride_gb,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0)
    row_programs = tl.cdiv(rows, BLOCK_N)
    if pid < row_programs:
        r = pid.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        row_sum = finished_sums(row_ptr, r, rows, rows, 0, 1, row_terms, rows, 1, 0, BLOCK_N, BLOCK_T)
        if bias_ptr is not None and not TRANSPOSED:
            row_sum += bias_term(bias_ptr, bias_grad_ptr, r, r < rows, stride_b, stride_gb, row_sum.dtype)
        tl.store(row_dot_ptr + r, row_sum, mask=r < rows)
    else:
        count = groups * channels
        k = (pid - row_programs).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        column_sum = finished_sums(
            column_ptr,
            k,
            count,
            channels,
            row_splits * columns,
            stride_channel,
            row_splits,
            columns,
            positions,
            stride_position,
            BLOCK_N,
            BLOCK_T,
        )
        if bias_ptr is not None and TRANSPOSED:
            column_sum += bias_term(bias_ptr, bias_grad_ptr, k, k < count, stride_b, stride_gb, column_sum.dtype)
        tl.store(column_dot_ptr + k, column_sum, mask=k < count)


@triton.jit
def bias_term(bias_ptr, bias_grad_ptr, i, mask, stride_b, stride_gb, ACC: tl.constexpr):
    """b * gb of the channels ``i``."""
    bias = tl.load(bias_ptr + i * stride_b, mask=mask, other=0.0)
    return bias.to(ACC) * tl.load(bias_grad_ptr + i * stride_gb, mask=mask, other=0.0).to(ACC)


@dataclass(frozen=True)
class WeightWalk:
    """A weight and its gradient as (groups, rows per group, columns); columns run over channels and kernel positions.

    Attributes:
        channels, positions: columns = channels * positions.
        stride_channel, stride_position: where channel and kernel position lie among the columns.
        sizes: the columns as three axes, outermost first.
        strides: per tensor, the strides of the rows and of those three axes.
        flat: columns are adjacent in memory in both tensors.
        align: elements that one load may span: they divide the columns and the strides of the rows.
    """

    groups: int
    rows_per_group: int
    channels: int
    positions: int
    stride_channel: int
    stride_position: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    flat: bool
    align: int

    @property
    def rows(self) -> int:
        return self.groups * self.rows_per_group

    @property
    def columns(self) -> int:
        return self.channels * self.positions

    @property
    def size_class(self) -> tuple[int | bool, ...]:
        """The key of tuned launch parameters."""
        return (*autotune.size_class(self.groups, self.rows_per_group, self.columns), self.flat, self.align)

    @classmethod
    def over(cls, weight: Tensor, grad: Tensor, groups: int) -> WeightWalk | None:
        """None where the kernel positions form more than two separate axes in memory."""
        kernel = merged_axes(range(2, weight.dim()), weight, grad)
        if len(kernel) > 2:
            return None
        channel = Axis(weight.shape[1], (weight.stride(1), grad.stride(1)))
        # In channels-last memory the channels are adjacent: then they are the innermost axis of the columns.
        channels_last = bool(kernel) and max(channel.strides) < max(kernel[-1].strides)
        axes = [*kernel, channel] if channels_last else [channel, *kernel]
        positions = math.prod(axis.size for axis in kernel)
        axes = [Axis(1, (0, 0))] * (3 - len(axes)) + axes
        flat = all(_adjacent([(axis.size, axis.strides[t]) for axis in axes]) for t in range(2))
        strides = tuple(
            (tensor.stride(0), *(axis.strides[t] for axis in axes)) for t, tensor in enumerate((weight, grad))
        )
        channels, vector = weight.shape[1], VECTOR_BYTES // weight.element_size()
        return cls(
            groups=groups,
            rows_per_group=weight.shape[0] // groups,
            channels=channels,
            positions=positions,
            stride_channel=1 if channels_last else positions,
            stride_position=channels if channels_last else 1,
            sizes=tuple(axis.size for axis in axes),
            strides=strides,
            flat=flat,
            align=math.gcd(vector, channels * positions, strides[0][0], strides[1][0]) if flat else 1,
        )


def _adjacent(axes: list[tuple[int, int]]) -> bool:
    """Whether axes of these (size, stride), outermost first, enumerate memory one element after the other."""
    step = 1
    for size, stride in reversed(axes):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@dataclass(frozen=True)
class WeightDotConfig:
    """Launch parameters of one shape."""

    block_g: int
    block_r: int
    block_m: int
    tiles_per_split: int
    num_warps: int = 4

    # Outputs and terms of one program of the second stage: 64 outputs leave it enough programs, 32 terms are one
    # round trip to the cache for most layers.
    BLOCK_N = 64
    BLOCK_T = 32

    @classmethod
    def from_heuristic(cls, walk: WeightWalk, itemsize: int) -> WeightDotConfig:
        tile = tile_elements(itemsize, walk.align) // (1 if walk.flat else 2)
        # One warp reads such a piece of a row, and sums it by itself.
        block_m = power_of_two(walk.columns, run_elements(itemsize))
        block_r = power_of_two(walk.rows_per_group, tile // block_m)
        # Depthwise layers have one row a group: a tile then spans groups.
        block_g = power_of_two(walk.groups, tile // block_m // block_r) if walk.rows_per_group < 8 else 1
        tiles = (
            ceil_div(walk.rows_per_group, block_r) * ceil_div(walk.columns, block_m) * ceil_div(walk.groups, block_g)
        )
        return cls(block_g, block_r, block_m, cls.tiles_for(tiles, most_programs=1024))

    @classmethod
    def variations(cls, walk: WeightWalk, itemsize: int) -> dict[str, WeightDotConfig]:
        """The heuristic, tiles of half and of twice its rows, and half and twice its tiles a program."""
        base = cls.from_heuristic(walk, itemsize)
        tiles = base.tiles_per_split
        return {
            autotune.HEURISTIC: base,
            "half tile": replace(base, block_r=max(1, base.block_r // 2)),
            "double tile": replace(base, block_r=base.block_r * 2, num_warps=8),
            "half tiles a program": replace(base, tiles_per_split=max(1, tiles // 2)),
            "double tiles a program": replace(base, tiles_per_split=tiles * 2),
        }

    @staticmethod
    def tiles_for(tiles: int, most_programs: int) -> int:
        """Tiles of rows per program: as many as leave ``most_programs``, at most eight.

        Eight tiles are 128 rows of partial sums added before they are written: under 2 % of the bytes.
        """
        return min(8, max(1, ceil_div(tiles, most_programs)))

    def row_splits(self, walk: WeightWalk) -> int:
        return ceil_div(ceil_div(walk.rows_per_group, self.block_r), self.tiles_per_split)

    def column_blocks(self, walk: WeightWalk) -> int:
        return ceil_div(walk.columns, self.block_m)

    def programs(self, walk: WeightWalk) -> int:
        return ceil_div(walk.groups, self.block_g) * self.row_splits(walk) * self.column_blocks(walk)


def rows_outer(weight: Tensor, grad: Tensor, groups: int, transposed: bool) -> tuple[Tensor, Tensor, bool]:
    """A matrix whose rows are adjacent in memory, read as its transpose, so that columns are; no copy."""
    if (
        weight.dim() == 2
        and groups == 1
        and max(weight.stride(0), grad.stride(0)) < max(weight.stride(1), grad.stride(1))
    ):
        return weight.t(), grad.t(), not transposed
    return weight, grad, transposed


def weight_dot_triton(
    weight: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
    config: WeightDotConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`obc.ops.weight_dot` for checked arguments.

    Strides are honoured. Only where the kernel positions form more than two separate axes in memory (a permuted and
    sliced 3-D kernel) are both tensors copied to contiguous memory first.
    """
    weight, grad, transposed = rows_outer(weight, grad, groups, transposed)
    walk = WeightWalk.over(weight, grad, groups)
    if walk is None:
        return weight_dot_triton(weight.contiguous(), grad.contiguous(), bias, bias_grad, groups, transposed, config)
    config = config or autotune.choose(
        "weight_dot",
        WeightDotConfig,
        (walk, weight.element_size()),
        walk.size_class,
        weight,
        lambda config: weight_dot_triton(weight, grad, bias, bias_grad, groups, transposed, config),
    )
    check_steps("weight_dot", config.programs(walk))
    partials = _partial_sums(weight, grad, walk, config)
    row_dot, column_dot = _finished_dots(*partials, walk, bias, bias_grad, transposed, config)
    return (column_dot, row_dot) if transposed else (row_dot, column_dot)


def _partial_sums(weight: Tensor, grad: Tensor, walk: WeightWalk, config: WeightDotConfig) -> tuple[Tensor, Tensor]:
    """The first stage: (column blocks, rows) and (groups, row splits, columns)."""
    column_blocks, row_splits = config.column_blocks(walk), config.row_splits(walk)
    row_partial = weight.new_empty((column_blocks, walk.rows), dtype=accumulator(weight))
    column_partial = row_partial.new_empty((walk.groups, row_splits, walk.columns))
    launch(
        weight_dot_kernel,
        config.programs(walk),
        row_partial,
        column_partial,
        weight,
        grad,
        None,
        walk.groups,
        walk.rows_per_group,
        walk.columns,
        *walk.sizes[1:],
        column_blocks,
        row_splits,
        config.tiles_per_split,
        *walk.strides[0],
        *walk.strides[1],
        BLOCK_G=config.block_g,
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        FLAT=walk.flat,
        ALIGN=walk.align,
        num_warps=config.num_warps,
        max_registers=128 if walk.flat else ADDRESS_REGISTERS,
    )
    return row_partial, column_partial


def _finished_dots(
    row_partial: Tensor,
    column_partial: Tensor,
    walk: WeightWalk,
    bias: Tensor | None,
    bias_grad: Tensor | None,
    transposed: bool,
    config: WeightDotConfig,
) -> tuple[Tensor, Tensor]:
    """The second stage: (rows,) and (groups * channels,), with b * gb in the sums of the out channels."""
    row_dot, column_dot = (row_partial.new_empty(size) for size in (walk.rows, walk.groups * walk.channels))
    launch(
        _weight_dot_finish_kernel,
        ceil_div(len(row_dot), config.BLOCK_N) + ceil_div(len(column_dot), config.BLOCK_N),
        row_dot,
        column_dot,
        row_partial,
        column_partial,
        bias,
        bias_grad,
        walk.rows,
        row_partial.shape[0],
        walk.groups,
        walk.channels,
        walk.columns,
        column_partial.shape[1],
        walk.positions,
        walk.stride_channel,
        walk.stride_position,
        0 if bias is None else bias.stride(0),
        0 if bias_grad is None else bias_grad.stride(0),
        TRANSPOSED=transposed,
        BLOCK_N=config.BLOCK_N,
        BLOCK_T=config.BLOCK_T,
        num_warps=config.num_warps,
    )
    return row_dot, column_dot


def _case(*shape: int, groups: int = 1, step: int = 1) -> Callable[[torch.dtype], Any]:
    def run(dtype: torch.dtype) -> Any:
        weight = empty(dtype, *shape, step=step)
        return weight_dot_triton(weight, weight, groups=groups)

    return run


CASES = (
    Case("weight_dot", "linear", _case(4096, 4096)),
    Case("weight_dot", "conv", _case(512, 256, 3, 3)),
    Case("weight_dot", "depthwise", _case(512, 1, 3, 3, groups=512), aligned=False),
    Case("weight_dot", "strided", _case(512, 256, 3, 3, step=2), aligned=False),
)
