"""channel_moments: four sums per channel of one tensor, from which criteria of activations are made.

    m[0, c] = sum x,  m[1, c] = sum x^2,  m[2, c] = sum |x|,
    m[3, c] = sum over samples b of (mean over b's positions of |x|)^2

Shapes: x (B, C, P), any strides; P is the product of all other dimensions. A mask (B, P) leaves positions out.
Bytes: x once (and the mask once per block of channels), plus partial sums of 3 * splits * B * C accumulators, written
and read once; where samples have one position each, they are summed as positions, and B is 1.
Accumulation: float32, float64 for float64 input. Deterministic as :mod:`obc_kernels.channel_dot` is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import autotune
from obc_kernels.case import Case, empty
from obc_kernels.launch import launch
from obc_kernels.layout import Walk, accumulator, aligned, ceil_div, check_steps, outer_offset, power_of_two
from obc_kernels.weight_moments import WeightMomentsConfig, narrowed


@triton.jit
def _channel_moments_kernel(
    partial_ptr,  # (splits, 3, rows, C), or (splits, 4, rows, C) with a mask: the fourth counts positions
    x_ptr,
    mask_ptr,
    step,  # rows * C
    rows,
    channels,
    size_1,
    size_2,
    inner,
    inner_tiles,
    tiles,
    tiles_per_split,
    channel_blocks,
    stride_xn,
    stride_xc,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xp,
    stride_mn,
    stride_m0,
    stride_m1,
    stride_m2,
    stride_mp,
    HAS_MASK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_P: tl.constexpr,
):
    pid = tl.program_id(0)
    block = (pid % channel_blocks).to(tl.int64)
    row = (pid // channel_blocks % rows).to(tl.int64)
    split = pid // channel_blocks // rows

    c = block * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    ALIGN: tl.constexpr = ALIGN_C * ALIGN_P  # one of them is 1
    x_row = x_ptr + aligned(row * stride_xn, ALIGN)
    x_channel = c * aligned(stride_xc, ALIGN_P)
    c_mask = c < aligned(channels, ALIGN_C)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_C, BLOCK_P // RUN), dtype=ACC)
    square = tl.zeros((BLOCK_C, BLOCK_P // RUN), dtype=ACC)
    absolute = tl.zeros((BLOCK_C, BLOCK_P // RUN), dtype=ACC)
    count = tl.zeros((BLOCK_P,), dtype=ACC)
    for tile in range(split * tiles_per_split, tl.minimum(tiles, (split + 1) * tiles_per_split)):
        outer = tile // inner_tiles
        p = (tile % inner_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        x_tile = x_row + aligned(outer_offset(outer, size_1, size_2, stride_x0, stride_x1, stride_x2), ALIGN)
        x_position = p * aligned(stride_xp, ALIGN_C)
        p_mask = p < aligned(inner, ALIGN_P)
        if HAS_MASK:
            m_tile = mask_ptr + row * stride_mn + outer_offset(outer, size_1, size_2, stride_m0, stride_m1, stride_m2)
            p_mask = p_mask & (tl.load(m_tile + p * stride_mp, mask=p_mask, other=0) != 0)
            count += p_mask.to(ACC)
        mask = c_mask[:, None] & p_mask[None, :]
        x = tl.load(x_tile + (x_channel[:, None] + x_position[None, :]), mask=mask, other=0.0).to(ACC)
        total += narrowed(x, BLOCK_C, BLOCK_P, RUN, CHANNELS_INNER)
        square += narrowed(x * x, BLOCK_C, BLOCK_P, RUN, CHANNELS_INNER)
        absolute += narrowed(tl.abs(x), BLOCK_C, BLOCK_P, RUN, CHANNELS_INNER)
    MOMENTS: tl.constexpr = 4 if HAS_MASK else 3
    out = partial_ptr + split.to(tl.int64) * MOMENTS * step + row * channels + c
    tl.store(out, tl.sum(total, axis=1), mask=c_mask)
    out += step
    tl.store(out, tl.sum(square, axis=1), mask=c_mask)
    out += step
    tl.store(out, tl.sum(absolute, axis=1), mask=c_mask)
    if HAS_MASK:
        tl.store(out + step, tl.sum(count, axis=0), mask=c_mask)


@triton.jit
def _channel_moments_finish_kernel(
    sum_ptr,  # (C), as the three after it
    square_ptr,
    absolute_ptr,
    mean_square_ptr,
    partial_ptr,  # (splits, 3 or 4, rows, C)
    step,  # rows * C
    rows,
    channels,
    splits,
    positions,
    HAS_MASK: tl.constexpr,
    ALONE: tl.constexpr,  # every sample has one position, and all of them came as one row
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    square = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    absolute = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    mean_square = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    for first in range(0, rows, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
        mask = (n < rows)[:, None] & (c < channels)[None, :]
        pointers = partial_ptr + n[:, None] * channels + c[None, :]
        sample_sum = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
        count = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
        for _ in range(splits):
            total += tl.load(pointers, mask=mask, other=0.0)
            pointers += step
            square += tl.load(pointers, mask=mask, other=0.0)
            pointers += step
            sample_sum += tl.load(pointers, mask=mask, other=0.0)
            pointers += step
            if HAS_MASK:
                count += tl.load(pointers, mask=mask, other=0.0)
                pointers += step
        if not HAS_MASK:
            count += positions
        mean = sample_sum / tl.maximum(count, 1.0)
        absolute += sample_sum
        mean_square += mean * mean
    c_mask = c < channels
    all_squares = tl.sum(square, axis=0)
    tl.store(sum_ptr + c, tl.sum(total, axis=0), mask=c_mask)
    tl.store(square_ptr + c, all_squares, mask=c_mask)
    tl.store(absolute_ptr + c, tl.sum(absolute, axis=0), mask=c_mask)
    tl.store(mean_square_ptr + c, all_squares if ALONE else tl.sum(mean_square, axis=0), mask=c_mask)


@dataclass(frozen=True)
class FinishConfig:
    """Launch parameters of the second stage."""

    block_c: int
    block_n: int
    num_warps: int = 4

    # 32 channels are one 128-byte line of float32; 512 entries a sum leave its four sums 16 registers a thread.
    BLOCK_C = 32
    TILE = 512

    @classmethod
    def from_heuristic(cls, rows: int, channels: int) -> FinishConfig:
        block_c = power_of_two(channels, cls.BLOCK_C)
        return cls(block_c, power_of_two(rows, cls.TILE // block_c))


def channel_moments_triton(
    x: Tensor, channel_dim: int, mask: Tensor | None = None, config: WeightMomentsConfig | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`obc.ops.channel_moments` for checked arguments; ``channel_dim`` counts from 0.

    Strides are honoured. Only where the positions form more than four separate axes in memory are the inputs copied to
    contiguous memory first.
    """
    channels = x.shape[channel_dim]
    alone = x.numel() == x.shape[0] * channels
    spread = [] if mask is None else [mask.unsqueeze(channel_dim).expand(x.shape)]
    walk = Walk.over(channel_dim, not alone, x, *spread)
    if walk is None:
        return channel_moments_triton(x.contiguous(), channel_dim, None if mask is None else mask.contiguous(), config)
    make = x.new_zeros if x.numel() == 0 else x.new_empty
    first, second, third, fourth = (make(channels, dtype=accumulator(x)) for _ in range(4))
    if x.numel() == 0:
        return first, second, third, fourth
    config = config or autotune.choose(
        "channel_moments",
        WeightMomentsConfig,
        (walk, x.element_size()),
        walk.size_class,
        x,
        lambda config: channel_moments_triton(x, channel_dim, mask, config),
    )
    partial = _launch_partials(walk, x, mask, config)
    finish = FinishConfig.from_heuristic(walk.rows, channels)
    launch(
        _channel_moments_finish_kernel,
        ceil_div(channels, finish.block_c),
        first,
        second,
        third,
        fourth,
        partial,
        walk.rows * channels,
        walk.rows,
        channels,
        config.splits,
        walk.outer_steps * walk.inner,
        HAS_MASK=mask is not None,
        ALONE=alone,
        BLOCK_C=finish.block_c,
        BLOCK_N=finish.block_n,
        num_warps=finish.num_warps,
    )
    return first, second, third, fourth


def _launch_partials(walk: Walk, x: Tensor, mask: Tensor | None, config: WeightMomentsConfig) -> Tensor:
    """(splits, 3 sums, rows, C) partial sums; with a mask, also the numbers of positions as a fourth."""
    channels = walk.channels
    blocks, inner_tiles = ceil_div(channels, config.block_o), ceil_div(walk.inner, config.block_p)
    tiles = walk.outer_steps * inner_tiles
    programs = blocks * walk.rows * config.splits
    check_steps("channel_moments", max(tiles, programs))
    partial = x.new_empty((config.splits, 3 if mask is None else 4, walk.rows, channels), dtype=accumulator(x))
    strides = (0,) * len(walk.strides[0]) if mask is None else walk.strides[1]
    launch(
        _channel_moments_kernel,
        programs,
        partial,
        x,
        x if mask is None else mask.view(torch.uint8),
        walk.rows * channels,
        walk.rows,
        channels,
        *walk.outer[1:],
        walk.inner,
        inner_tiles,
        tiles,
        ceil_div(tiles, config.splits),
        blocks,
        *walk.strides[0],
        strides[0],
        *strides[2:],
        HAS_MASK=mask is not None,
        BLOCK_C=config.block_o,
        BLOCK_P=config.block_p,
        RUN=config.run,
        CHANNELS_INNER=walk.channels_inner,
        ALIGN_C=walk.align if walk.channels_inner else 1,
        ALIGN_P=1 if walk.channels_inner else walk.align,
        num_warps=config.num_warps,
    )
    return partial


CASES = (
    Case("channel_moments", "tokens", lambda dtype: channel_moments_triton(empty(dtype, 8, 2048, 4096), 2)),
    Case(
        "channel_moments",
        "tokens, masked",
        lambda dtype: channel_moments_triton(empty(dtype, 8, 2048, 4096), 2, empty(torch.bool, 8, 2048)),
    ),
    Case("channel_moments", "channel-first", lambda dtype: channel_moments_triton(empty(dtype, 64, 256, 56, 56), 1)),
)
