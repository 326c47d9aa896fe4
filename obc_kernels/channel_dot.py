"""channel_dot: the sum of activation times gradient per channel.

    r[n, c] = sum over positions p of activation[n, c, p] * grad[n, c, p]        (rows n only with per_sample)

Shapes: activation and grad (rows, C, P), any strides, each its own; P is the product of all other dimensions.
Bytes: both inputs once, plus partial sums of splits * rows * C accumulators written and read once.
Accumulation: float32, float64 for float64 input. Deterministic: fixed tiles, whose partial sums a second kernel
adds in a fixed order; the split depends on shape and strides alone, so every device gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from obc_kernels import autotune
from obc_kernels.case import Case, empty
from obc_kernels.launch import launch
from obc_kernels.layout import (
    Walk,
    accumulator,
    aligned,
    ceil_div,
    check_steps,
    outer_offset,
    power_of_two,
    run_elements,
    tile_elements,
)
from obc_kernels.partials import sum_partials


@triton.jit
def _channel_dot_kernel(
    partial_ptr,  # (splits, rows, C)
    a_ptr,
    g_ptr,
    rows,
    channels,
    size_1,
    size_2,
    inner,
    inner_tiles,
    tiles,
    tiles_per_split,
    channel_blocks,
    stride_an,
    stride_ac,
    stride_a0,
    stride_a1,
    stride_a2,
    stride_ap,
    stride_gn,
    stride_gc,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_gp,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_P: tl.constexpr,
):
    pid = tl.program_id(0)
    block = (pid % channel_blocks).to(tl.int64)
    row = (pid // channel_blocks % rows).to(tl.int64)
    split = pid // channel_blocks // rows

    c = block * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    ALIGN: tl.constexpr = ALIGN_C * ALIGN_P  # one of them is 1
    a_row = a_ptr + aligned(row * stride_an, ALIGN)
    g_row = g_ptr + aligned(row * stride_gn, ALIGN)
    a_channel = c * aligned(stride_ac, ALIGN_P)
    g_channel = c * aligned(stride_gc, ALIGN_P)
    c_mask = c < aligned(channels, ALIGN_C)
    acc = tl.zeros((BLOCK_C, BLOCK_P), dtype=partial_ptr.dtype.element_ty)
    for tile in range(split * tiles_per_split, tl.minimum(tiles, (split + 1) * tiles_per_split)):
        outer = tile // inner_tiles
        p = (tile % inner_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        a_tile = a_row + aligned(outer_offset(outer, size_1, size_2, stride_a0, stride_a1, stride_a2), ALIGN)
        g_tile = g_row + aligned(outer_offset(outer, size_1, size_2, stride_g0, stride_g1, stride_g2), ALIGN)
        a_position = p * aligned(stride_ap, ALIGN_C)
        g_position = p * aligned(stride_gp, ALIGN_C)
        mask = c_mask[:, None] & (p < aligned(inner, ALIGN_P))[None, :]
        a = tl.load(a_tile + (a_channel[:, None] + a_position[None, :]), mask=mask, other=0.0)
        g = tl.load(g_tile + (g_channel[:, None] + g_position[None, :]), mask=mask, other=0.0)
        acc += a.to(acc.dtype) * g.to(acc.dtype)
    tl.store(partial_ptr + (split.to(tl.int64) * rows + row) * channels + c, tl.sum(acc, axis=1), mask=c_mask)


@dataclass(frozen=True)
class ChannelDotConfig:
    """Launch parameters of one shape."""

    block_c: int
    block_p: int
    splits: int
    num_warps: int = 4

    # About two waves of four programs on each of 132 multiprocessors: the second evens out the tail.
    PROGRAMS = 1024

    @classmethod
    def from_heuristic(cls, walk: Walk, itemsize: int) -> ChannelDotConfig:
        block_c, block_p = cls.blocks_for(walk, itemsize)
        return cls(block_c, block_p, cls.splits_for(walk, block_c, block_p))

    @classmethod
    def variations(cls, walk: Walk, itemsize: int) -> dict[str, ChannelDotConfig]:
        """The heuristic, tiles of half and of twice its positions, and half and twice its programs."""
        block_c, block_p = cls.blocks_for(walk, itemsize)
        half, double = max(1, block_p // 2), 2 * block_p
        return {
            autotune.HEURISTIC: cls.from_heuristic(walk, itemsize),
            "half tile": cls(block_c, half, cls.splits_for(walk, block_c, half)),
            "double tile": cls(block_c, double, cls.splits_for(walk, block_c, double), num_warps=8),
            "half programs": cls(block_c, block_p, cls.splits_for(walk, block_c, block_p, cls.PROGRAMS // 2)),
            "double programs": cls(block_c, block_p, cls.splits_for(walk, block_c, block_p, cls.PROGRAMS * 2)),
        }

    @staticmethod
    def blocks_for(walk: Walk, itemsize: int) -> tuple[int, int]:
        """Channels and positions of one tile."""
        tile, run = tile_elements(itemsize, walk.align), run_elements(itemsize)
        if walk.channels_inner:
            block_c = power_of_two(walk.channels, run)
            return block_c, power_of_two(walk.inner, tile // block_c)
        # With few channels, the rest of the tile goes to the run along the positions.
        block_p = power_of_two(walk.inner, max(run, tile // power_of_two(walk.channels, tile)))
        return power_of_two(walk.channels, tile // block_p), block_p

    @staticmethod
    def splits_for(walk: Walk, block_c: int, block_p: int, programs: int = PROGRAMS) -> int:
        """How many programs share the positions of one channel block."""
        tiles = walk.outer_steps * ceil_div(walk.inner, block_p)
        wanted = ceil_div(programs, walk.rows * ceil_div(walk.channels, block_c))
        return ceil_div(tiles, ceil_div(tiles, min(tiles, wanted)))


def channel_dot_triton(
    activation: Tensor,
    grad: Tensor,
    channel_dim: int,
    per_sample: bool = False,
    config: ChannelDotConfig | None = None,
) -> Tensor:
    """Launch :func:`obc.ops.channel_dot` for checked arguments; ``channel_dim`` counts from 0.

    Strides are honoured. Only where the positions form more than four separate axes in memory (a sliced and
    permuted tensor of six or more dimensions) are both inputs copied to contiguous memory first.
    """
    walk = Walk.over(channel_dim, per_sample, activation, grad)
    if walk is None:
        return channel_dot_triton(activation.contiguous(), grad.contiguous(), channel_dim, per_sample, config)
    shape = (walk.rows, walk.channels) if per_sample else (walk.channels,)
    if activation.numel() == 0:
        return activation.new_zeros(shape, dtype=accumulator(activation))
    config = config or autotune.choose(
        "channel_dot",
        ChannelDotConfig,
        (walk, activation.element_size()),
        walk.size_class,
        activation,
        lambda config: channel_dot_triton(activation, grad, channel_dim, per_sample, config),
    )
    channel_blocks, inner_tiles = ceil_div(walk.channels, config.block_c), ceil_div(walk.inner, config.block_p)
    tiles = walk.outer_steps * inner_tiles
    programs = channel_blocks * walk.rows * config.splits
    check_steps("channel_dot", max(tiles, programs))
    partial = activation.new_empty((config.splits, *shape), dtype=accumulator(activation))
    launch(
        _channel_dot_kernel,
        programs,
        partial,
        activation,
        grad,
        walk.rows,
        walk.channels,
        *walk.outer[1:],
        walk.inner,
        inner_tiles,
        tiles,
        ceil_div(tiles, config.splits),
        channel_blocks,
        *walk.strides[0],
        *walk.strides[1],
        BLOCK_C=config.block_c,
        BLOCK_P=config.block_p,
        ALIGN_C=walk.align if walk.channels_inner else 1,
        ALIGN_P=1 if walk.channels_inner else walk.align,
        num_warps=config.num_warps,
    )
    return sum_partials(partial)


def _case(shape: tuple[int, ...], dim: int, per_sample: bool = False, step: int = 1) -> Callable[[torch.dtype], Tensor]:
    def run(dtype: torch.dtype) -> Tensor:
        tensor = empty(dtype, *shape, step=step)
        return channel_dot_triton(tensor, tensor, dim, per_sample)

    return run


CASES = (
    Case("channel_dot", "tokens", _case((8, 2048, 4096), 2)),
    Case("channel_dot", "tokens by sample", _case((8, 2048, 4096), 2, per_sample=True)),
    Case("channel_dot", "channel-first", _case((64, 256, 56, 56), 1)),
    Case("channel_dot", "channel-first 14x14", _case((64, 256, 14, 14), 1), aligned=False),
    Case("channel_dot", "few channels", _case((64, 3, 224, 224), 1)),
    Case("channel_dot", "strided", _case((64, 256, 56, 56), 1, step=2), aligned=False),
)
