"""weight_moments: five sums per row of a weight, from which the other criteria are made.

    m[0, o] = sum w g,  m[1, o] = sum (w g)^2,  m[2, o] = sum |w g|,  m[3, o] = sum w^2,  m[4, o] = sum |w|

Shapes: weight and grad (O, P), any strides, each its own; P is the product of all dimensions but the first.
Bytes: both inputs once, plus partial sums of 5 * splits * O accumulators written and read once.
Accumulation: float32, float64 for float64 input. Deterministic as :mod:`obc_kernels.channel_dot` is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import autotune
from obc_kernels.case import Case, empty
from obc_kernels.channel_dot import ChannelDotConfig
from obc_kernels.launch import launch
from obc_kernels.layout import (
    VECTOR_BYTES,
    Walk,
    accumulator,
    aligned,
    ceil_div,
    check_steps,
    outer_offset,
)
from obc_kernels.partials import separate, sum_partials


@triton.jit
def narrowed(terms, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, RUN: tl.constexpr, ROWS_INNER: tl.constexpr):
    """[BLOCK_O, BLOCK_P / RUN]: sums of the ``RUN`` positions that one thread holds, so that no thread waits.

    Those are neighbours where positions are adjacent in memory, and every (BLOCK_P / RUN)-th where rows are.
    """
    if ROWS_INNER:
        return tl.sum(tl.reshape(terms, (BLOCK_O, RUN, BLOCK_P // RUN)), axis=1)
    return tl.sum(tl.reshape(terms, (BLOCK_O, BLOCK_P // RUN, RUN)), axis=2)


@triton.jit
def _weight_moments_kernel(
    partial_ptr,  # (splits, 5, O)
    w_ptr,
    g_ptr,
    out_channels,
    size_1,
    size_2,
    inner,
    inner_tiles,
    tiles,
    tiles_per_split,
    blocks,
    stride_wo,
    stride_w0,
    stride_w1,
    stride_w2,
    stride_wp,
    stride_go,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_gp,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RUN: tl.constexpr,
    ROWS_INNER: tl.constexpr,
    ALIGN_O: tl.constexpr,
    ALIGN_P: tl.constexpr,
):
    pid = tl.program_id(0)
    block = (pid % blocks).to(tl.int64)
    split = pid // blocks

    o = block * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    ALIGN: tl.constexpr = ALIGN_O * ALIGN_P  # one of them is 1
    w_row = o * aligned(stride_wo, ALIGN_P)
    g_row = o * aligned(stride_go, ALIGN_P)
    o_mask = o < aligned(out_channels, ALIGN_O)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    dot = tl.zeros((BLOCK_O, BLOCK_P // RUN), dtype=ACC)
    dot_square = tl.zeros((BLOCK_O, BLOCK_P // RUN), dtype=ACC)
    dot_abs = tl.zeros((BLOCK_O, BLOCK_P // RUN), dtype=ACC)
    square = tl.zeros((BLOCK_O, BLOCK_P // RUN), dtype=ACC)
    magnitude = tl.zeros((BLOCK_O, BLOCK_P // RUN), dtype=ACC)
    for tile in range(split * tiles_per_split, tl.minimum(tiles, (split + 1) * tiles_per_split)):
        outer = tile // inner_tiles
        p = (tile % inner_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        w_tile = w_ptr + aligned(outer_offset(outer, size_1, size_2, stride_w0, stride_w1, stride_w2), ALIGN)
        g_tile = g_ptr + aligned(outer_offset(outer, size_1, size_2, stride_g0, stride_g1, stride_g2), ALIGN)
        w_position = p * aligned(stride_wp, ALIGN_O)
        g_position = p * aligned(stride_gp, ALIGN_O)
        mask = o_mask[:, None] & (p < aligned(inner, ALIGN_P))[None, :]
        w = tl.load(w_tile + (w_row[:, None] + w_position[None, :]), mask=mask, other=0.0).to(ACC)
        g = tl.load(g_tile + (g_row[:, None] + g_position[None, :]), mask=mask, other=0.0).to(ACC)
        wg = w * g
        dot += narrowed(wg, BLOCK_O, BLOCK_P, RUN, ROWS_INNER)
        dot_square += narrowed(wg * wg, BLOCK_O, BLOCK_P, RUN, ROWS_INNER)
        dot_abs += narrowed(tl.abs(wg), BLOCK_O, BLOCK_P, RUN, ROWS_INNER)
        square += narrowed(w * w, BLOCK_O, BLOCK_P, RUN, ROWS_INNER)
        magnitude += narrowed(tl.abs(w), BLOCK_O, BLOCK_P, RUN, ROWS_INNER)
    out = partial_ptr + split.to(tl.int64) * 5 * out_channels + o
    tl.store(out, tl.sum(dot, axis=1), mask=o_mask)
    tl.store(out + out_channels, tl.sum(dot_square, axis=1), mask=o_mask)
    tl.store(out + 2 * out_channels, tl.sum(dot_abs, axis=1), mask=o_mask)
    tl.store(out + 3 * out_channels, tl.sum(square, axis=1), mask=o_mask)
    tl.store(out + 4 * out_channels, tl.sum(magnitude, axis=1), mask=o_mask)


@dataclass(frozen=True)
class WeightMomentsConfig:
    """Launch parameters of one shape."""

    block_o: int
    block_p: int
    run: int
    splits: int
    num_warps: int = 4

    @classmethod
    def from_heuristic(cls, walk: Walk, itemsize: int) -> WeightMomentsConfig:
        # Five accumulators: the terms of one thread are added before they reach them, which keeps channel_dot's tile
        # in registers.
        block_o, block_p = ChannelDotConfig.blocks_for(walk, itemsize)
        return cls._of(walk, itemsize, block_o, block_p)

    @classmethod
    def _of(
        cls, walk: Walk, itemsize: int, block_o: int, block_p: int, programs: int = ChannelDotConfig.PROGRAMS
    ) -> WeightMomentsConfig:
        run = min(4 if walk.channels_inner else VECTOR_BYTES // itemsize, block_p)
        return cls(block_o, block_p, run, ChannelDotConfig.splits_for(walk, block_o, block_p, programs))

    @classmethod
    def variations(cls, walk: Walk, itemsize: int) -> dict[str, WeightMomentsConfig]:
        """The heuristic, tiles of half its positions, and half and twice its programs."""
        block_o, block_p = ChannelDotConfig.blocks_for(walk, itemsize)
        programs = ChannelDotConfig.PROGRAMS
        return {
            autotune.HEURISTIC: cls.from_heuristic(walk, itemsize),
            "half tile": cls._of(walk, itemsize, block_o, max(1, block_p // 2)),
            "half programs": cls._of(walk, itemsize, block_o, block_p, programs // 2),
            "double programs": cls._of(walk, itemsize, block_o, block_p, programs * 2),
        }


def weight_moments_triton(
    weight: Tensor, grad: Tensor, config: WeightMomentsConfig | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`obc.ops.weight_moments` for checked arguments.

    Strides are honoured. Only where the positions form more than four separate axes in memory are both inputs
    copied to contiguous memory first.
    """
    walk = Walk.over(0, False, weight, grad)
    if walk is None:
        return weight_moments_triton(weight.contiguous(), grad.contiguous(), config)
    if weight.numel() == 0:
        return _five(weight.new_zeros((5, walk.channels), dtype=accumulator(weight)))
    config = config or autotune.choose(
        "weight_moments",
        WeightMomentsConfig,
        (walk, weight.element_size()),
        walk.size_class,
        weight,
        lambda config: weight_moments_triton(weight, grad, config),
    )
    blocks, inner_tiles = ceil_div(walk.channels, config.block_o), ceil_div(walk.inner, config.block_p)
    tiles = walk.outer_steps * inner_tiles
    check_steps("weight_moments", tiles)
    partial = weight.new_empty((config.splits, 5, walk.channels), dtype=accumulator(weight))
    launch(
        _weight_moments_kernel,
        blocks * config.splits,
        partial,
        weight,
        grad,
        walk.channels,
        *walk.outer[1:],
        walk.inner,
        inner_tiles,
        tiles,
        ceil_div(tiles, config.splits),
        blocks,
        *walk.strides[0][1:],
        *walk.strides[1][1:],
        BLOCK_O=config.block_o,
        BLOCK_P=config.block_p,
        RUN=config.run,
        ROWS_INNER=walk.channels_inner,
        ALIGN_O=walk.align if walk.channels_inner else 1,
        ALIGN_P=1 if walk.channels_inner else walk.align,
        num_warps=config.num_warps,
        max_registers=168,  # five sums: three programs a multiprocessor
    )
    return _five(sum_partials(partial))


def _five(moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth, fifth = separate(moments.unbind())
    return first, second, third, fourth, fifth


def _case(weight: Callable[[torch.dtype], Tensor]) -> Callable[[torch.dtype], Any]:
    return lambda dtype: weight_moments_triton(weight(dtype), weight(dtype))


CASES = (
    Case("weight_moments", "conv", _case(lambda dtype: empty(dtype, 512, 256, 3, 3))),
    Case("weight_moments", "strided", _case(lambda dtype: empty(dtype, 512, 256, 3, 3, step=2)), aligned=False),
    Case("weight_moments", "transposed", _case(lambda dtype: empty(dtype, 4096, 4096).t())),
)
